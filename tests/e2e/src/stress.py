"""Hard work on a file system, checked against what it must have become.

    stress.py FOLDER PROCESSES OPERATIONS     random operations, each process in a folder of its own and all in one
    stress.py --lock FILE free|hold|taken     POSIX record locks
"""
import errno, fcntl, mmap, os, random, shutil, sys


class Worker:
    """One process: a folder and what must be in it. Files are bytearrays in a list, so that hard links share them."""

    def __init__(self, folder, shared, seed):
        self.folder, self.shared, self.random = folder, shared, random.Random(seed)
        self.files, self.links, self.folders, self.modes = {}, {}, [""], {}
        os.mkdir(folder)

    def path(self, name):
        return os.path.join(self.folder, name)

    def fresh(self):
        while True:
            name = os.path.join(self.random.choice(self.folders), "%x" % self.random.randrange(1 << 20))
            if name not in self.files and name not in self.links and name not in self.folders:
                return name

    def file(self):
        return self.random.choice(sorted(self.files)) if self.files else None

    def data(self):
        return self.random.randbytes(self.random.choice([0, 1, 100, 4096, 5000, 70000]))

    def create(self):
        name, data = self.fresh(), self.data()
        with open(self.path(name), "xb") as file:
            file.write(data)
        self.files[name] = [bytearray(data)]

    def write(self):
        if name := self.file():
            data, content = self.data(), self.files[name][0]
            at = self.random.randrange(len(content) + 5000)
            with open(self.path(name), "r+b", buffering=0) as file:
                file.seek(at)
                file.write(data)
                if self.random.random() < 0.1:
                    os.fsync(file.fileno())
            if data:
                content.extend(bytes(max(0, at - len(content))))
                content[at : at + len(data)] = data

    def append(self):
        if name := self.file():
            data = self.data()
            with open(self.path(name), "ab") as file:
                file.write(data)
            self.files[name][0] += data

    def map(self):
        name = self.file()
        if name and self.files[name][0]:
            content = self.files[name][0]
            with open(self.path(name), "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                at = self.random.randrange(len(content))
                memory[at] = content[at] = self.random.randrange(256)
                memory.flush()

    def truncate(self):
        if name := self.file():
            content, size = self.files[name][0], self.random.randrange(100000)
            os.truncate(self.path(name), size)
            del content[size:]
            content.extend(bytes(size - len(content)))

    def read(self):
        if name := self.file():
            with open(self.path(name), "rb") as file:
                assert file.read() == self.files[name][0], "content of " + name

    def rename(self):
        if name := self.file():
            to = self.file() if self.random.random() < 0.3 else self.fresh()
            os.rename(self.path(name), self.path(to))
            # Two names of one file: rename does nothing.
            if to != name and not (to in self.files and self.files[to] is self.files[name]):
                self.files[to] = self.files.pop(name)
                if name in self.modes:
                    self.modes[to] = self.modes.pop(name)
                else:
                    self.modes.pop(to, None)

    def hard_link(self):
        if name := self.file():
            to = self.fresh()
            os.link(self.path(name), self.path(to))
            self.files[to] = self.files[name]
            self.modes.pop(name, None)

    def symbolic_link(self):
        name, target = self.fresh(), "../" * self.random.randrange(4) + "target%d" % self.random.randrange(1000)
        os.symlink(target, self.path(name))
        self.links[name] = target

    def remove(self):
        kind = self.random.choice([self.files, self.links])
        if kind:
            name = self.random.choice(sorted(kind))
            os.unlink(self.path(name))
            del kind[name]
            self.modes.pop(name, None)

    def change_mode(self):
        name = self.file()
        # Of a file with one name, so that there is one place to remember it.
        if name and sum(other is self.files[name] for other in self.files.values()) == 1:
            self.modes[name] = self.random.choice([0o600, 0o644, 0o755, 0o4711])
            os.chmod(self.path(name), self.modes[name])

    def make_folder(self):
        if len(self.folders) < 12:
            name = self.fresh()
            os.mkdir(self.path(name))
            self.folders.append(name)

    def remove_folder(self):
        name = self.random.choice(self.folders)
        used = any(os.path.dirname(other) == name for kind in (self.files, self.links, self.folders) for other in kind if other)
        if name and used:
            try:
                os.rmdir(self.path(name))
                raise AssertionError("a full folder was removed: " + name)
            except OSError as error:
                assert error.errno == errno.ENOTEMPTY, error
        elif name:
            os.rmdir(self.path(name))
            self.folders.remove(name)

    def unlinked(self):
        """A file that is open lives on without its name."""
        name, data = self.fresh(), self.data()
        with open(self.path(name), "w+b", buffering=0) as file:
            os.unlink(self.path(name))
            file.write(data)
            file.seek(0)
            assert file.read() == data, "a file without a name"

    def race(self):
        """All processes at the same few names: any of these may fail, and nothing may break."""
        a, b = (os.path.join(self.shared, "name%d" % self.random.randrange(8)) for _ in range(2))
        try:
            self.random.choice([
                lambda: open(a, "wb").close(), lambda: os.rename(a, b), lambda: os.unlink(a), lambda: os.mkdir(a),
                lambda: os.rmdir(a), lambda: os.link(a, b), lambda: os.symlink(b, a), lambda: os.listdir(self.shared),
                lambda: os.chmod(a, 0o755), lambda: os.truncate(a, 1000), lambda: os.stat(a),
            ])()
        except OSError as error:
            expected = (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.ELOOP)
            assert error.errno in expected, error

    def check(self):
        found = set()
        for folder, folders, files in os.walk(self.folder):
            inner = os.path.relpath(folder, self.folder)
            found.update(os.path.normpath(os.path.join(inner, name)) for name in folders + files)
        expected = set(self.files) | set(self.links) | set(self.folders[1:])
        assert found == expected, "names: %s" % sorted(found ^ expected)
        for name, [content] in self.files.items():
            with open(self.path(name), "rb") as file:
                assert file.read() == content, "content of " + name
            stat = os.stat(self.path(name))
            count = sum(other is self.files[name] for other in self.files.values())
            assert stat.st_nlink == count, "links of %s: %d, not %d" % (name, stat.st_nlink, count)
            if name in self.modes and count == 1:
                assert stat.st_mode & 0o7777 == self.modes[name], "mode of " + name
        for name, target in self.links.items():
            assert os.readlink(self.path(name)) == target, "target of " + name

    def run(self, operations):
        kinds = [
            self.create, self.create, self.write, self.write, self.append, self.map, self.truncate, self.read, self.rename,
            self.hard_link, self.symbolic_link, self.remove, self.change_mode, self.make_folder, self.remove_folder,
            self.unlinked, self.race, self.race,
        ]
        for number in range(operations):
            kind = self.random.choice(kinds)
            try:
                kind()
            except Exception as error:
                raise AssertionError("operation %d, %s: %r" % (number, kind.__name__, error)) from error
            if number % 500 == 499:
                self.check()
        self.check()


def stress(folder, processes, operations):
    shared = os.path.join(folder, "shared")
    os.makedirs(shared)
    children = []
    for number in range(processes):
        child = os.fork()
        if not child:
            try:
                Worker(os.path.join(folder, "worker%d" % number), shared, number).run(operations)
                os._exit(0)
            except BaseException as error:
                print("worker %d: %r" % (number, error), flush=True)
                os._exit(1)
        children.append(child)
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    print("%d processes, %d operations each, %d failed" % (processes, operations, failed))
    shutil.rmtree(folder)
    return failed


def lock(path, what):
    with open(path, "r+b") as file:
        take = lambda flags, start, length: fcntl.lockf(file, flags, length, start)
        if what == "taken":
            try:
                take(fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 10)
            except OSError as error:
                return 0 if error.errno in (errno.EAGAIN, errno.EACCES) else 2
            return 1
        take(fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 100)
        take(fcntl.LOCK_UN, 50, 10)
        # Another process sees the hole, and nothing else.
        for start, free in ((0, False), (50, True), (60, False), (100, True)):
            child = os.fork()
            if not child:
                with open(path, "r+b") as other:
                    try:
                        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, start)
                        os._exit(1)
                    except OSError:
                        os._exit(0)
            assert (os.waitpid(child, 0)[1] != 0) == free, "lock at %d" % start
        if what == "hold":
            print("HOLDING", flush=True)
            sys.stdin.readline()
    print("RELEASED", flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--lock":
        sys.exit(lock(sys.argv[2], sys.argv[3]))
    sys.exit(stress(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
