//! Requests and replies of the transmission phase, message by message: every
//! error value, every edge of a range, every form of a reply.

use crate::support::memory_disk::{Kind, MemoryDisk};
use crate::support::nbd_peer::{Peer, Rig, request, structured};
use dysk::device::{BlockDevice, DeviceError, Extent, Geometry, ReadData};
use dysk::nbd::transmission::Session;
use dysk::nbd::wire::reply::{Chunk, Errno, StatusExtent};
use dysk::nbd::wire::request::{Command, RequestHeader, flag};

const MIB: u64 = 1 << 20;
const K4: u32 = 4096;

fn disk() -> MemoryDisk {
    MemoryDisk::new(MIB).recording()
}

/// Sends one request, expects this error (0 for none) in a simple reply, and
/// then proves the stream to be in step with a read.
async fn expect_error(peer: &mut Peer, header: RequestHeader, payload: &[u8], error: u32) {
    peer.send(header, payload).await;
    let reply = peer.simple().await;
    assert_eq!(
        (reply.cookie, reply.error),
        (header.cookie, error),
        "{header:?}"
    );
    peer.send(request(Command::Read, !0, 0, 512), b"").await;
    let reply = peer.simple().await;
    assert_eq!((reply.cookie, reply.error), (!0, 0), "after {header:?}");
    peer.receive(512).await;
}

#[tokio::test]
async fn each_invalid_request_gets_its_error_and_the_stream_stays_in_step() {
    let mut rig = Rig::new(disk().max_payload(64 << 10), Session::default());
    let end = MIB - 512;
    let (inval, nospace) = (Errno::Inval.code(), Errno::NoSpace.code());
    let big = 64 << 10;
    let cases = [
        // Beyond the end: reads and trims are invalid, writes find no space.
        (Command::Read, 0, end, 1024, inval),
        (Command::Read, 0, MIB, 512, inval),
        (Command::Read, 0, u64::MAX, 512, inval),
        (Command::Trim, 0, end, 1024, inval),
        (Command::Write, 0, end, 1024, nospace),
        (Command::Write, 0, u64::MAX - 511, 512, nospace),
        (Command::WriteZeroes, 0, end, 1024, nospace),
        // Flags that are unknown, or belong to another command, or were not
        // negotiated.
        (Command::Read, flag::DF, 0, 512, inval),
        (Command::Read, flag::NO_HOLE, 0, 512, inval),
        (Command::Write, flag::NO_HOLE, 0, 512, inval),
        (Command::Write, 1 << 15, 0, 512, inval),
        (Command::Trim, flag::FAST_ZERO, 0, 512, inval),
        (Command::WriteZeroes, flag::REQ_ONE, 0, 512, inval),
        (Command::Flush, flag::DF, 0, 0, inval),
        // Lengths.
        (Command::Read, 0, 0, 0, inval),
        (Command::Write, 0, 0, 0, inval),
        (Command::Trim, 0, 0, 0, inval),
        (Command::WriteZeroes, 0, 0, 0, inval),
        (Command::Read, 0, 0, big + 1, inval),
        (Command::Read, 0, 0, u32::MAX, inval),
        (Command::Write, 0, 0, big + 1, inval),
        (Command::Write, 0, 0, 3 << 20, inval),
        (Command::Flush, 0, 512, 0, inval),
        (Command::Flush, 0, 0, 512, inval),
        // What was not offered.
        (Command::BlockStatus, 0, 0, 512, inval),
        (Command::Cache, 0, 0, 512, inval),
        // And what is fine at the very edge.
        (Command::Write, 0, end, 512, 0),
        (Command::WriteZeroes, 0, end, 512, 0),
        (Command::Trim, 0, end, 512, 0),
        (Command::Write, 0, 0, big, 0),
        (Command::Flush, 0, 0, 0, 0),
        (Command::Flush, flag::FUA, 0, 0, 0),
    ];
    for (cookie, (command, flags, offset, length, error)) in (1..).zip(cases) {
        let header = RequestHeader {
            flags,
            ..request(command, cookie, offset, length)
        };
        let payload = vec![0xee; header.payload_len()];
        expect_error(&mut rig.peer, header, &payload, error).await;
    }
    for command in [8, 99, u16::MAX] {
        let header = RequestHeader {
            command,
            ..request(Command::Read, 5, 0, 512)
        };
        expect_error(&mut rig.peer, header, b"", inval).await;
    }
    let writes: Vec<_> = rig
        .disk
        .asked()
        .into_iter()
        .filter(|asked| asked.kind == Kind::Write)
        .map(|asked| (asked.offset, asked.len))
        .collect();
    assert_eq!(
        writes,
        [(end, 512), (0, big.into())],
        "a refused write got through"
    );
}

#[tokio::test]
async fn a_read_only_device_permits_nothing_that_writes() {
    let mut rig = Rig::new(disk().read_only(), Session::default());
    for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
        // Permission comes before range.
        for offset in [0, MIB] {
            let header = request(command, 1, offset, K4);
            let payload = vec![0; header.payload_len()];
            expect_error(&mut rig.peer, header, &payload, Errno::Perm.code()).await;
        }
    }
}

#[tokio::test]
async fn what_the_device_says_is_what_the_client_hears() {
    let errors = [
        (
            DeviceError::Io("fenced".into()),
            Errno::Io,
            "i/o error: fenced",
        ),
        (
            DeviceError::Invalid("odd".into()),
            Errno::Inval,
            "invalid request: odd",
        ),
        (
            DeviceError::NoSpace,
            Errno::NoSpace,
            "beyond the end of the device",
        ),
        (DeviceError::ReadOnly, Errno::Perm, "read-only device"),
        (DeviceError::Shutdown, Errno::Shutdown, "shutting down"),
        // Only a fast zero may hear of what is not supported.
        (DeviceError::NotSupported, Errno::Inval, "not supported"),
    ];
    for (error, errno, message) in errors {
        let failing = move || {
            let error = error.clone();
            disk().fail(move |asked| (asked.kind == Kind::Write).then(|| error.clone()))
        };
        let write = request(Command::Write, 3, 0, 512);
        let mut simple = Rig::new(failing(), Session::default());
        expect_error(&mut simple.peer, write, &[1; 512], errno.code()).await;
        let mut rig = Rig::new(failing(), structured());
        rig.peer.send(write, &[1; 512]).await;
        let expected = Chunk::Error {
            error: errno.code(),
            message: message.into(),
            offset: None,
        };
        assert_eq!(rig.peer.chunk().await, (3, true, expected));
    }
}

#[tokio::test]
async fn a_fast_zero_is_fast_or_not_supported() {
    let slow = disk().fail(|asked| {
        (asked.kind == Kind::WriteZeroes && asked.offset == 8192)
            .then_some(DeviceError::NotSupported)
    });
    let mut rig = Rig::new(slow, Session::default());
    let fast = |offset, flags| RequestHeader {
        flags: flag::FAST_ZERO | flags,
        ..request(Command::WriteZeroes, 1, offset, K4)
    };
    let notsup = Errno::NotSup.code();
    expect_error(&mut rig.peer, fast(0, 0), b"", 0).await;
    expect_error(&mut rig.peer, fast(8192, 0), b"", notsup).await;
    expect_error(&mut rig.peer, fast(0, flag::NO_HOLE), b"", notsup).await;
    expect_error(&mut rig.peer, fast(1, 0), b"", notsup).await;
    let asked = rig.disk.asked();
    let zeroed = asked.iter().filter(|asked| asked.kind == Kind::WriteZeroes);
    assert_eq!(zeroed.count(), 2, "a refused zero reached the device");
}

#[tokio::test]
async fn forced_unit_access_reaches_the_device_with_every_write() {
    let mut rig = Rig::new(disk(), Session::default());
    for command in [
        Command::Write,
        Command::Trim,
        Command::WriteZeroes,
        Command::Read,
    ] {
        for flags in [0, flag::FUA] {
            let header = RequestHeader {
                flags,
                ..request(command, 1, 0, 512)
            };
            let payload = vec![7; header.payload_len()];
            rig.peer.send(header, &payload).await;
            assert_eq!(rig.peer.simple().await.error, 0);
            if command == Command::Read {
                rig.peer.receive(512).await;
            }
        }
    }
    let fua: Vec<_> = rig.disk.asked().iter().map(|asked| asked.fua).collect();
    assert_eq!(fua, [false, true, false, true, false, true, false, false]);
}

#[tokio::test]
async fn simple_reads_carry_data_and_zeroes_alike() {
    let mut rig = Rig::new(disk(), Session::default());
    rig.peer
        .send(request(Command::Write, 1, 4096, K4), &[5; 4096])
        .await;
    assert_eq!(rig.peer.simple().await.error, 0);
    rig.peer
        .send(request(Command::Read, 2, 100, 1 << 19), b"")
        .await;
    let reply = rig.peer.simple().await;
    assert_eq!((reply.cookie, reply.error), (2, 0));
    let data = rig.peer.receive(1 << 19).await;
    assert_eq!(data[..], rig.disk.contents(100, 1 << 19)[..]);
    assert_eq!(data.iter().filter(|&&byte| byte == 5).count(), 4096);
}

#[tokio::test]
async fn structured_reads_show_holes() {
    let mut rig = Rig::new(disk(), structured());
    rig.peer
        .send(request(Command::Write, 1, 4096, 2 * K4), &[5; 8192])
        .await;
    assert_eq!(rig.peer.simple().await.error, 0);

    rig.peer
        .send(request(Command::Read, 2, 512, 16384), b"")
        .await;
    assert_eq!(
        rig.peer.chunks().await,
        [
            Chunk::OffsetHole {
                offset: 512,
                length: 3584
            },
            Chunk::OffsetData {
                offset: 4096,
                data: vec![5; 8192].into()
            },
            Chunk::OffsetHole {
                offset: 12288,
                length: 4608
            },
        ]
    );
    let unfragmented = |offset, length| RequestHeader {
        flags: flag::DF,
        ..request(Command::Read, 3, offset, length)
    };
    rig.peer.send(unfragmented(512, 16384), b"").await;
    let data = rig.disk.contents(512, 16384).into();
    assert_eq!(
        rig.peer.chunks().await,
        [Chunk::OffsetData { offset: 512, data }]
    );
    // A hole alone is one chunk, fragmented or not.
    rig.peer.send(unfragmented(65536, 8192), b"").await;
    assert_eq!(
        rig.peer.chunks().await,
        [Chunk::OffsetHole {
            offset: 65536,
            length: 8192
        }]
    );
}

#[tokio::test]
async fn a_read_in_very_many_pieces_is_sent_as_one() {
    let mut rig = Rig::new(disk(), structured());
    for block in (0..256).step_by(2) {
        rig.peer
            .send(request(Command::Write, 1, block * 4096, K4), &[6; 4096])
            .await;
        assert_eq!(rig.peer.simple().await.error, 0);
    }
    rig.peer
        .send(request(Command::Read, 2, 0, 1 << 20), b"")
        .await;
    let data = rig.disk.contents(0, 1 << 20).into();
    assert_eq!(
        rig.peer.chunks().await,
        [Chunk::OffsetData { offset: 0, data }]
    );
}

#[tokio::test]
async fn structured_errors_carry_text_and_reads_never_get_a_simple_reply() {
    let mut rig = Rig::new(disk(), structured());
    rig.peer
        .send(request(Command::Read, 9, MIB, 512), b"")
        .await;
    let expected = Chunk::Error {
        error: Errno::Inval.code(),
        message: "1048576+512 is beyond the end of the device at 1048576".into(),
        offset: None,
    };
    assert_eq!(rig.peer.chunk().await, (9, true, expected));
}

#[tokio::test]
async fn block_status_reports_runs_and_one_when_one_is_wanted() {
    let mut rig = Rig::new(disk(), structured());
    rig.peer
        .send(request(Command::Write, 1, 4096, 2 * K4), &[5; 8192])
        .await;
    assert_eq!(rig.peer.simple().await.error, 0);
    let extent = |length, status| StatusExtent { length, status };
    rig.peer
        .send(request(Command::BlockStatus, 2, 0, 1 << 20), b"")
        .await;
    let extents = vec![
        extent(4096, 3),
        extent(8192, 0),
        extent((1 << 20) - 12288, 3),
    ];
    let whole = Chunk::BlockStatus {
        context: 1,
        extents,
    };
    assert_eq!(rig.peer.chunk().await, (2, true, whole));

    let one = RequestHeader {
        flags: flag::REQ_ONE,
        ..request(Command::BlockStatus, 3, 5000, 1 << 19)
    };
    rig.peer.send(one, b"").await;
    let extents = vec![extent(12288 - 5000, 0)];
    let first = Chunk::BlockStatus {
        context: 1,
        extents,
    };
    assert_eq!(rig.peer.chunk().await, (3, true, first));

    rig.peer
        .send(request(Command::BlockStatus, 4, MIB - 512, 1024), b"")
        .await;
    let (_, _, chunk) = rig.peer.chunk().await;
    assert!(matches!(chunk, Chunk::Error { error: 22, .. }), "{chunk:?}");
}

/// A device whose answers are not what was asked.
struct Liar;

impl BlockDevice for Liar {
    fn geometry(&self) -> Geometry {
        MemoryDisk::new(MIB).geometry()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, DeviceError> {
        assert_ne!(offset, 4096, "this read panics");
        tokio::task::yield_now().await;
        assert_ne!(offset, 8192, "this read panics later");
        Ok(ReadData::zeroes(len as usize - 1))
    }

    async fn write(&self, _: u64, _: bytes::Bytes, _: bool) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn trim(&self, _: u64, _: u64, _: bool) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn write_zeroes(&self, _: u64, _: u64, _: bool, _: bool) -> Result<(), DeviceError> {
        Ok(())
    }

    /// More and longer extents than anybody asked for.
    async fn extents(&self, _: u64, _: u64) -> Result<Vec<Extent>, DeviceError> {
        let extent = |allocated| Extent {
            len: 1 << 33,
            allocated,
            zero: false,
        };
        Ok(vec![extent(true), extent(false)])
    }
}

#[tokio::test]
async fn a_device_that_errs_breaks_one_request_and_not_the_stream() {
    let mut rig = Rig::new(Liar, Session::default());
    for offset in [0, 4096, 8192] {
        rig.peer
            .send(request(Command::Read, offset, offset, 512), b"")
            .await;
        let reply = rig.peer.simple().await;
        assert_eq!((reply.cookie, reply.error), (offset, Errno::Io.code()));
    }
    let mut rig = Rig::new(Liar, structured());
    rig.peer
        .send(request(Command::BlockStatus, 1, 0, 4096), b"")
        .await;
    let extents = vec![StatusExtent {
        length: 4096,
        status: 0,
    }];
    let cut = Chunk::BlockStatus {
        context: 1,
        extents,
    };
    assert_eq!(rig.peer.chunk().await, (1, true, cut));
}
