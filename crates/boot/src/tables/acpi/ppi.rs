//! The TPM's physical presence interface (TCG Physical Presence Interface Specification 1.3): how an OS asks firmware to do
//! to the TPM what only somebody in front of the machine may ask for.
//!
//! The method leaves requests in a piece of memory that firmware reads after the next reset. Its layout is that of QEMU
//! (`docs/specs/tpm.rst`), which both OVMF and bhyve's firmware know:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 256 | for each operation, whether it is allowed; written by firmware |
//! | 0x105 | 4 | response to the last operation |
//! | 0x109 | 4 | pending operation |
//! | 0x10d | 4 | its parameter |
//! | 0x111 | 4 | the last operation |
//! | 0x15a | 1 | memory is to be overwritten at the next start |

use super::super::TPM_PPI;
use super::aml::{
    Seg, Term, add, and, arg, buffer, call, element, else_, equal, fields, greater, if_, index, int, memory_region,
    name, name_of, nowhere, package, return_, serialized_method, store, string, uuid,
};

/// 3dddfaa6-361b-4eb4-a424-8d10089d1653: physical presence.
const PRESENCE: [u8; 16] =
    [0x3d, 0xdd, 0xfa, 0xa6, 0x36, 0x1b, 0x4e, 0xb4, 0xa4, 0x24, 0x8d, 0x10, 0x08, 0x9d, 0x16, 0x53];
/// 376054ed-cc13-4675-901c-4756d7f2d45d: clearing of memory at reset (TCG Platform Reset Attack Mitigation 1.0).
const MEMORY_CLEAR: [u8; 16] =
    [0x37, 0x60, 0x54, 0xed, 0xcc, 0x13, 0x46, 0x75, 0x90, 0x1c, 0x47, 0x56, 0xd7, 0xf2, 0xd4, 0x5d];

const RESPONSE: Seg = *b"PPRP";
const REQUEST: Seg = *b"PPRQ";
const PARAMETER: Seg = *b"PPRM";
const LAST_REQUEST: Seg = *b"LPPR";
const OVERWRITE: Seg = *b"MOVV";
/// Packages for answers.
const PAIR: Seg = *b"TPM2";
const TRIPLE: Seg = *b"TPM3";
/// The method that reads the permission of an operation.
const PERMISSION: Seg = *b"TPFN";

const SUCCESS: u8 = 0;
const NOT_IMPLEMENTED: u8 = 1;
const BLOCKED: u8 = 3;
/// Permissions (the answers of function 8).
const OPERATION_NOT_IMPLEMENTED: u8 = 0;
const OPERATION_BLOCKED: u8 = 2;
const PERMISSION_MASK: u8 = 7;

/// The interface's region, its fields and methods, as part of the TPM's device.
pub(super) fn terms() -> Vec<Term> {
    const REGION: Seg = *b"TPP2";
    let address = int(TPM_PPI.start.0);
    vec![
        memory_region(REGION, address, TPM_PPI.size),
        fields(
            REGION,
            &[
                (0x105, 4, RESPONSE),
                (0x109, 4, REQUEST),
                (0x10d, 4, PARAMETER),
                (0x111, 4, LAST_REQUEST),
                (0x15a, 1, OVERWRITE),
            ],
        ),
        name(PAIR, package(vec![int(SUCCESS), int(0u8)])),
        name(TRIPLE, package(vec![int(SUCCESS), int(0u8), int(0u8)])),
        permission(),
        serialized_method(
            *b"_DSM",
            4,
            [
                if_(equal(arg(0), uuid(PRESENCE)), presence()),
                if_(equal(arg(0), uuid(MEMORY_CLEAR)), memory_clear()),
                return_(buffer(&[0])),
            ],
        ),
    ]
}

fn permission() -> Term {
    const REGION: Seg = *b"TPP1";
    const BYTE: Seg = *b"TPPF";
    serialized_method(
        PERMISSION,
        1,
        [
            if_(greater(arg(0), int(0xffu8)), [return_(int(OPERATION_NOT_IMPLEMENTED))]),
            memory_region(REGION, add(arg(0), int(TPM_PPI.start.0), nowhere()), 1),
            fields(REGION, &[(0, 1, BYTE)]),
            return_(and(name_of(BYTE), int(PERMISSION_MASK), nowhere())),
        ],
    )
}

/// What `_DSM` does for a function of an interface.
fn function(number: u8, terms: impl IntoIterator<Item = Term>) -> Term {
    if_(equal(arg(2), int(number)), terms)
}

/// Returns success and the values of fields, in a package that has room for them. A package cannot name fields itself: it would
/// hold references.
fn answer(room: Seg, values: &[Seg]) -> Vec<Term> {
    let mut terms: Vec<_> =
        (1..).zip(values).map(|(at, field)| store(name_of(*field), index(name_of(room), at))).collect();
    terms.push(return_(name_of(room)));
    terms
}

fn presence() -> Vec<Term> {
    const REBOOT: u8 = 2;
    const LANGUAGE_NOT_IMPLEMENTED: u8 = 3;
    let operation = || element(arg(3), 0);
    let submit = |parameter: Vec<Term>| {
        let mut terms = vec![
            if_(
                equal(call(PERMISSION, [operation()]), int(OPERATION_NOT_IMPLEMENTED)),
                [return_(int(NOT_IMPLEMENTED))],
            ),
            if_(equal(call(PERMISSION, [operation()]), int(OPERATION_BLOCKED)), [return_(int(BLOCKED))]),
            store(operation(), name_of(REQUEST)),
        ];
        terms.extend(parameter);
        terms.push(return_(int(SUCCESS)));
        terms
    };
    // The second revision of the interface has parameters.
    let with_parameter = equal(arg(1), int(2u8));
    vec![
        function(0, [return_(buffer(&[0xff, 0x01]))]),
        function(1, [return_(string("1.3"))]),
        function(2, submit(vec![store(int(0u8), name_of(PARAMETER))])),
        function(3, [if_(with_parameter, answer(TRIPLE, &[REQUEST, PARAMETER])), else_(answer(PAIR, &[REQUEST]))]),
        function(4, [return_(int(REBOOT))]),
        function(5, answer(TRIPLE, &[LAST_REQUEST, RESPONSE])),
        function(6, [return_(int(LANGUAGE_NOT_IMPLEMENTED))]),
        function(
            7,
            submit(vec![
                if_(equal(arg(1), int(2u8)), [store(element(arg(3), 1), name_of(PARAMETER))]),
                else_([store(int(0u8), name_of(PARAMETER))]),
            ]),
        ),
        function(8, [return_(call(PERMISSION, [operation()]))]),
        return_(buffer(&[0])),
    ]
}

fn memory_clear() -> Vec<Term> {
    vec![
        function(0, [return_(buffer(&[0x03]))]),
        function(1, [store(element(arg(3), 0), name_of(OVERWRITE)), return_(int(SUCCESS))]),
        return_(buffer(&[0])),
    ]
}
