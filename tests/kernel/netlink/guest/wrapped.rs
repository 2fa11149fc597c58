//! Run by scenarios of `refusal`, under other circumstances.

use dysk::nbd::kernel::{KernelError, NbdFamily, SocketPair};

use crate::netlink::attached::{MIB, in_guest, request};

#[test]
#[ignore = "runs inside the kernel lane"]
fn connect_names_the_capability() {
    in_guest();
    let (kernel, _server) = SocketPair::many(1).unwrap();
    let nbd = NbdFamily::open().unwrap();
    let error = nbd.connect(&request("x", MIB), &kernel).unwrap_err();
    assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn open_names_the_namespace() {
    in_guest();
    let error = NbdFamily::open().unwrap_err();
    assert!(matches!(error, KernelError::NetworkNamespace), "{error}");
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn open_succeeds() {
    in_guest();
    NbdFamily::open().unwrap();
}
