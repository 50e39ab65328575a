# What tests/storage.rs has its guest do. The host makes this file a disk of the guest.
#
#   write NAME SEED       batches of writes to the disk NAME, each followed by a flush: "SYNCED NAME n." for ever
#   verify NAME SEED N    everything up to batch N is there: "VERIFIED NAME blocks"
#
# The writes follow from the seed. Each sector says which batch and which block it is of.
import concurrent.futures, mmap, os, random, struct, sys

BLOCK = 4096
BATCH = 24
ALLOWED_BEYOND = 2

def device(name):
    return "/dev/disk/by-id/" + name

def batches(seed, blocks):
    """Endless batches of extents (first block, number of blocks) that do not overlap: 4 KB to 1 MB."""
    source = random.Random(seed)
    while True:
        taken, batch = set(), []
        while len(batch) < BATCH:
            count = source.choice([1, 1, 1, 1, 2, 3, 8, 16, 33, 256])
            first = source.randrange(blocks - count)
            extent = set(range(first, first + count))
            if not extent & taken:
                taken |= extent
                batch.append((first, count))
        yield batch

def content(number, first, count):
    return b"".join(struct.pack("<QQ", number, block) * (BLOCK // 16) for block in range(first, first + count))

def write(name, seed):
    fd = os.open(device(name), os.O_RDWR | os.O_DIRECT)
    size = os.lseek(fd, 0, os.SEEK_END)
    def one(number, first, count):
        buffer = mmap.mmap(-1, count * BLOCK)
        buffer.write(content(number, first, count))
        done = os.pwrite(fd, buffer, first * BLOCK)
        assert done == count * BLOCK, done
    with concurrent.futures.ThreadPoolExecutor(BATCH) as pool:
        for number, batch in enumerate(batches(seed, size // BLOCK), 1):
            for result in [pool.submit(one, number, *extent) for extent in batch]:
                result.result()
            os.fsync(fd)
            print(f"SYNCED {name} {number}.", flush=True)

def verify(name, seed, synced):
    fd = os.open(device(name), os.O_RDONLY)
    size = os.lseek(fd, 0, os.SEEK_END)
    # For each block the batches that it may be of: the last one flushed, or one begun after that.
    allowed = {}
    for number, batch in enumerate(batches(seed, size // BLOCK), 1):
        if number > synced + ALLOWED_BEYOND:
            break
        for first, count in batch:
            for block in range(first, first + count):
                if number <= synced:
                    allowed[block] = {number}
                else:
                    allowed.setdefault(block, {0}).add(number)
    for block, numbers in allowed.items():
        data = os.pread(fd, BLOCK, block * BLOCK)
        for sector in range(0, BLOCK, 512):
            number, place = struct.unpack_from("<QQ", data, sector)
            if number not in numbers or (number and place != block):
                sys.exit(f"WRONG {name} block {block}: of batch {number} and block {place}, not of {numbers}")
            if number and data[sector:sector + 512] != struct.pack("<QQ", number, block) * 32:
                sys.exit(f"WRONG {name} block {block}: mixed contents")
    print(f"VERIFIED {name} {len(allowed)}", flush=True)

if sys.argv[1] == "write":
    write(sys.argv[2], int(sys.argv[3]))
else:
    verify(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
