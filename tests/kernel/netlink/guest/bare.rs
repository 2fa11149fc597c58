//! On a kernel without the module.

use dysk::nbd::kernel::{KernelError, KernelNbd};

use crate::netlink::attached::in_guest;

#[test]
#[ignore = "runs inside the kernel lane"]
fn open_names_modprobe() {
    in_guest();
    let error = KernelNbd::open().unwrap_err();
    assert!(matches!(error, KernelError::NoModule), "{error}");
    assert!(error.to_string().contains("modprobe nbd"), "{error}");
}
