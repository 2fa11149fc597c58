//! The calls of the kernel's `nbd` generic netlink family, blocking
//! (`linux/nbd-netlink.h`). A call is carried out inside `send`, so it can
//! take as long as the driver likes: [`super::attach::KernelNbd`] keeps them
//! off every other thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
    sockopt,
};

use super::error::KernelError;
use super::message::{self, Attributes, Malformed, Message, Request};
use super::sysfs::Sysfs;

/// The controller that resolves family names (`GENL_ID_CTRL`).
const CONTROLLER: u16 = 0x10;
const CONTROLLER_GET_FAMILY: u8 = 3;
const CONTROLLER_FAMILY_ID: u16 = 1;
const CONTROLLER_FAMILY_NAME: u16 = 2;

const VERSION: u8 = 1;
const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
const STATUS: u8 = 5;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const DEVICE_LIST: u16 = 9;
const BACKEND_IDENTIFIER: u16 = 10;
/// Inside `SOCKETS` and `DEVICE_LIST`.
const ITEM: u16 = 1;
const ITEM_SOCKET_FD: u16 = 1;
const ITEM_DEVICE_INDEX: u16 = 1;
const ITEM_DEVICE_CONNECTED: u16 = 2;

/// `NBD_FLAG_CAN_MULTI_CONN` (proto.md, transmission flags).
const CAN_MULTI_CONN: u16 = 1 << 8;

/// The most sockets of one device: far more than connections are of use.
pub const MAX_SOCKETS: usize = 256;
/// The longest backend identifier in bytes.
pub const MAX_BACKEND: usize = 255;
/// How often another index is tried when a prober got hold of the one the
/// kernel had chosen.
const BUSY_RETRIES: u32 = 16;
/// The kernel queues its answer before `send` returns; this only bounds the
/// wait for one that was dropped.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What a device is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// N of `/dev/nbdN`; `None` lets the kernel choose, which is the way to
    /// go: a given index may be held open by a prober.
    pub index: Option<u32>,
    /// Size in bytes, a multiple of `block_size`.
    pub size_bytes: u64,
    /// Logical and physical block size in bytes: a power of two from 512 to
    /// the page size.
    pub block_size: u32,
    /// After how long an unanswered request shuts its connection and is sent
    /// again, on another one or on the one that takes its place; zero: 30 s with
    /// several connections, never with one. Whole seconds, rounded up. It makes
    /// no I/O error.
    pub timeout: Duration,
    /// How long I/O waits for a reconfigure when every connection is dead,
    /// before it fails with EIO. Whole seconds, rounded up.
    pub dead_connection_timeout: Duration,
    /// Transmission flags (proto.md): what the server can do. READ_ONLY makes
    /// the disk read-only; more than one socket needs CAN_MULTI_CONN.
    pub server_flags: u16,
    /// `NBD_CFLAG_*` of `linux/nbd.h`: 1 destroys the device on disconnect,
    /// 2 disconnects it on its last close.
    pub client_flags: u64,
    /// Tells whose device it is, in `/sys/block/nbdN/backend`. 1 to
    /// [`MAX_BACKEND`] bytes, no control characters.
    pub backend: String,
}

/// A connected device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    /// N of `/dev/nbdN`.
    pub index: u32,
}

/// What STATUS says of a device. An open file alone makes a device
/// "connected": whose it is only [`Sysfs`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// The driver holds a configuration for it.
    pub connected: bool,
}

impl Connect {
    /// Refuses what the driver would refuse without a word, or misread.
    fn check(&self, sockets: usize) -> Result<(), KernelError> {
        let invalid = |text: String| Err(KernelError::Invalid(text));
        check_backend(&self.backend)?;
        if sockets == 0 || sockets > MAX_SOCKETS {
            return invalid(format!("{sockets} sockets, 1 to {MAX_SOCKETS} can be had"));
        }
        if sockets > 1 && self.server_flags & CAN_MULTI_CONN == 0 {
            return invalid(format!(
                "{sockets} sockets need CAN_MULTI_CONN among the server flags"
            ));
        }
        let page = rustix::param::page_size() as u64;
        let block = u64::from(self.block_size);
        if !block.is_power_of_two() || !(512..=page).contains(&block) {
            return invalid(format!(
                "block size {block}: a power of two from 512 to {page} is needed"
            ));
        }
        check_size(self.size_bytes)?;
        if !self.size_bytes.is_multiple_of(block) {
            return invalid(format!(
                "size {} is no multiple of the block size {block}",
                self.size_bytes
            ));
        }
        Ok(())
    }
}

fn check_size(size: u64) -> Result<(), KernelError> {
    if size == 0 || size > i64::MAX as u64 {
        return Err(KernelError::Invalid(format!("size {size} bytes")));
    }
    Ok(())
}

fn check_backend(backend: &str) -> Result<(), KernelError> {
    if backend.is_empty() || backend.len() > MAX_BACKEND || backend.contains(char::is_control) {
        return Err(KernelError::Invalid(format!(
            "backend identifier {backend:?}: 1 to {MAX_BACKEND} bytes without control characters are needed"
        )));
    }
    Ok(())
}

fn whole_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

fn put_sockets(request: Request, sockets: &[impl AsFd]) -> Request {
    request.nested(SOCKETS, |list| {
        sockets.iter().fold(list, |list, socket| {
            list.nested(ITEM, |item| {
                item.u32(ITEM_SOCKET_FD, socket.as_fd().as_raw_fd().cast_unsigned())
            })
        })
    })
}

fn connect_request(family: u16, connect: &Connect, sockets: &[impl AsFd]) -> Request {
    let request = Request::new(family, CONNECT, VERSION, SEQUENCE);
    let request = match connect.index {
        Some(index) => request.u32(INDEX, index),
        None => request,
    };
    let request = request
        .u64(SIZE_BYTES, connect.size_bytes)
        .u64(BLOCK_SIZE_BYTES, u64::from(connect.block_size))
        // Always: a device keeps the timeout of its last life.
        .u64(TIMEOUT, whole_seconds(connect.timeout))
        .u64(
            DEAD_CONN_TIMEOUT,
            whole_seconds(connect.dead_connection_timeout),
        )
        .u64(SERVER_FLAGS, u64::from(connect.server_flags))
        .u64(CLIENT_FLAGS, connect.client_flags)
        .string(BACKEND_IDENTIFIER, &connect.backend);
    put_sockets(request, sockets)
}

/// Each call has a socket to itself, so any number will do.
const SEQUENCE: u32 = 1;

/// Why a call failed before it meant anything to one operation.
enum CallError {
    Kernel(Errno),
    Other(KernelError),
}

impl From<Malformed> for CallError {
    fn from(error: Malformed) -> Self {
        Self::Other(KernelError::Answer(error.to_string()))
    }
}

/// The nbd family as seen from this process. Every method blocks.
#[derive(Debug)]
pub struct NbdFamily {
    /// Kept open from the first call on: a proposed kernel change would tie
    /// devices to the life of the socket that configured them.
    socket: OwnedFd,
    sysfs: Sysfs,
}

impl NbdFamily {
    /// Opens a netlink socket and finds the family.
    ///
    /// # Errors
    /// [`KernelError::NoModule`], [`KernelError::NetworkNamespace`].
    pub fn open() -> Result<Self, KernelError> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::GENERIC),
        )
        .map_err(|errno| KernelError::Netlink(errno.into()))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))
            .map_err(|errno| KernelError::Netlink(errno.into()))?;
        let family = Self {
            socket,
            sysfs: Sysfs::default(),
        };
        family.resolve()?;
        Ok(family)
    }

    /// Connects `sockets` to a device. The kernel takes references of its
    /// own: close the descriptors afterwards.
    ///
    /// # Errors
    /// [`KernelError::InUse`] for a given index, [`KernelError::Invalid`],
    /// [`KernelError::TooOld`], and those of [`NbdFamily::open`].
    pub fn connect(&self, connect: &Connect, sockets: &[impl AsFd]) -> Result<Device, KernelError> {
        connect.check(sockets.len())?;
        let family = self.resolve()?;
        let mut tries = 0;
        let index = loop {
            let request = connect_request(family, connect, sockets);
            let asked = Instant::now();
            let answer = self.call(request, |message| {
                message
                    .attributes()?
                    .u32(INDEX)?
                    .ok_or(Malformed("no index in a connect reply"))
            });
            let microseconds = asked.elapsed().as_micros();
            tracing::debug!(microseconds, "connect answered");
            match (answer, connect.index) {
                (Ok(Some(index)), _) => break index,
                (Ok(None), _) => {
                    return Err(KernelError::Answer("connected, but to no index".to_owned()));
                }
                (Err(CallError::Kernel(Errno::BUSY)), Some(index)) => {
                    return Err(KernelError::InUse(index));
                }
                (Err(CallError::Kernel(Errno::BUSY)), None) if tries < BUSY_RETRIES => tries += 1,
                (Err(error), _) => return Err(explain("connect a device", error)),
            }
        };
        match self.sysfs.expect_ours(index, &connect.backend) {
            Ok(_) => Ok(Device { index }),
            // Before 5.14 the identifier is ignored: the device could never
            // be told from somebody else's.
            Err(error) => {
                self.disconnect_unchecked(index)?;
                Err(match error {
                    KernelError::NotOurs { found: None, .. } => {
                        KernelError::TooOld("its nbd driver keeps no backend identifier")
                    }
                    other => other,
                })
            }
        }
    }

    /// Gives a device new connections in place of dead ones. A socket for
    /// which none was dead is silently dropped: see
    /// [`super::sockets::is_abandoned`].
    ///
    /// # Errors
    /// [`KernelError::NotOurs`], [`KernelError::NoSuchDevice`].
    pub fn reconfigure(
        &self,
        index: u32,
        backend: &str,
        sockets: &[impl AsFd],
    ) -> Result<(), KernelError> {
        if sockets.is_empty() || sockets.len() > MAX_SOCKETS {
            return Err(KernelError::Invalid(format!(
                "{} sockets, 1 to {MAX_SOCKETS} can be had",
                sockets.len()
            )));
        }
        self.sysfs.expect_ours(index, backend)?;
        let request = self
            .request(RECONFIGURE)?
            .u32(INDEX, index)
            .string(BACKEND_IDENTIFIER, backend);
        self.command("reconnect a device", put_sockets(request, sockets))
    }

    /// Changes the size of a device, which may be open. Never together with
    /// new sockets: on 6.12 that fails I/O in flight.
    ///
    /// # Errors
    /// As [`NbdFamily::reconfigure`].
    pub fn resize(&self, index: u32, backend: &str, size_bytes: u64) -> Result<(), KernelError> {
        check_size(size_bytes)?;
        self.sysfs.expect_ours(index, backend)?;
        let request = self
            .request(RECONFIGURE)?
            .u32(INDEX, index)
            .string(BACKEND_IDENTIFIER, backend)
            .u64(SIZE_BYTES, size_bytes);
        self.command("resize a device", request)
    }

    /// Disconnects a device of ours; I/O that waits gets EIO. The caller has
    /// made sure that nobody uses it ([`super::busy`]).
    ///
    /// # Errors
    /// As [`NbdFamily::reconfigure`].
    pub fn disconnect(&self, index: u32, backend: &str) -> Result<(), KernelError> {
        self.sysfs.expect_ours(index, backend)?;
        self.disconnect_unchecked(index)
    }

    fn disconnect_unchecked(&self, index: u32) -> Result<(), KernelError> {
        let request = self.request(DISCONNECT)?.u32(INDEX, index);
        self.command("disconnect a device", request)
    }

    /// What the driver says of one device, or of all.
    ///
    /// # Errors
    /// [`KernelError::Refused`] and those of [`NbdFamily::open`].
    pub fn status(&self, index: Option<u32>) -> Result<Vec<DeviceStatus>, KernelError> {
        let request = self.request(STATUS)?;
        let request = match index {
            Some(index) => request.u32(INDEX, index),
            None => request,
        };
        self.call(request, parse_status)
            .map(Option::unwrap_or_default)
            .map_err(|error| explain("report status", error))
    }

    fn request(&self, command: u8) -> Result<Request, KernelError> {
        Ok(Request::new(self.resolve()?, command, VERSION, SEQUENCE))
    }

    fn command(&self, operation: &'static str, request: Request) -> Result<(), KernelError> {
        self.call(request, |_| Ok(()))
            .map(drop)
            .map_err(|error| explain(operation, error))
    }

    /// The family's number. Asked anew for every call, for the module may be
    /// reloaded under a new one.
    fn resolve(&self) -> Result<u16, KernelError> {
        let request = Request::new(CONTROLLER, CONTROLLER_GET_FAMILY, VERSION, SEQUENCE)
            .string(CONTROLLER_FAMILY_NAME, "nbd");
        let answer = self.call(request, |message| {
            message
                .attributes()?
                .u16(CONTROLLER_FAMILY_ID)?
                .ok_or(Malformed("no family id"))
        });
        match answer {
            Ok(Some(id)) => Ok(id),
            Ok(None) => Err(KernelError::Answer("no answer to a family name".to_owned())),
            Err(CallError::Kernel(Errno::NOENT)) => Err(self.sysfs.why_no_family()),
            Err(error) => Err(explain("find the nbd family", error)),
        }
    }

    /// Sends a request and reads up to its acknowledgement. Returns what
    /// `parse` makes of the payload, if one came.
    fn call<T>(
        &self,
        request: Request,
        parse: impl Fn(Message<'_>) -> Result<T, Malformed>,
    ) -> Result<Option<T>, CallError> {
        let failed = |errno: Errno| CallError::Other(KernelError::Netlink(errno.into()));
        let bytes = request.finish();
        rustix::io::retry_on_intr(|| send(&self.socket, &bytes, SendFlags::empty()))
            .map_err(failed)?;
        let mut buffer = vec![0; 256 << 10];
        let mut answer = None;
        loop {
            let (_, length) = rustix::io::retry_on_intr(|| {
                recv(&self.socket, buffer.as_mut_slice(), RecvFlags::TRUNC)
            })
            .map_err(failed)?;
            let mut datagram = buffer
                .get(..length)
                .ok_or(Malformed("answer larger than 256 KiB"))?;
            while let Some(message) = message::next_message(&mut datagram)? {
                if message.kind != message::ERROR {
                    answer = Some(parse(message)?);
                    continue;
                }
                return match message.errno()? {
                    0 => Ok(answer),
                    code => Err(CallError::Kernel(Errno::from_raw_os_error(code))),
                };
            }
        }
    }
}

fn parse_status(message: Message<'_>) -> Result<Vec<DeviceStatus>, Malformed> {
    let Some(list) = message.attributes()?.find(DEVICE_LIST)? else {
        return Ok(Vec::new());
    };
    let mut devices = Vec::new();
    for item in Attributes(list) {
        let (kind, payload) = item?;
        if kind != ITEM {
            continue;
        }
        let index = Attributes(payload).u32(ITEM_DEVICE_INDEX)?;
        let connected = Attributes(payload).u8(ITEM_DEVICE_CONNECTED)?;
        if let (Some(index), Some(connected)) = (index, connected) {
            devices.push(DeviceStatus {
                index,
                connected: connected != 0,
            });
        }
    }
    Ok(devices)
}

fn explain(operation: &'static str, error: CallError) -> KernelError {
    match error {
        CallError::Kernel(Errno::PERM | Errno::ACCESS) => KernelError::NotPermitted(operation),
        CallError::Kernel(errno) => KernelError::Refused {
            operation,
            source: io::Error::from(errno),
        },
        CallError::Other(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect() -> Connect {
        Connect {
            index: Some(5),
            size_bytes: 1 << 30,
            block_size: 4096,
            timeout: Duration::from_millis(1),
            dead_connection_timeout: Duration::from_secs(600),
            server_flags: 0x10d,
            client_flags: 0,
            backend: "vol".to_owned(),
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn connect_is_encoded_as_nbd_netlink_h_says() {
        let socket = std::fs::File::open("/dev/null").unwrap();
        let fd = socket.as_raw_fd().to_le_bytes();
        let bytes = connect_request(0x1c, &connect(), &[&socket]).finish();
        #[rustfmt::skip]
        let expected = [
            124, 0, 0, 0, 0x1c, 0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0,
            1, 1, 0, 0, // NBD_CMD_CONNECT, version 1
            8, 0, 1, 0, 5, 0, 0, 0, // index
            12, 0, 2, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, // size
            12, 0, 3, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, // block size
            12, 0, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0, // timeout, rounded up
            12, 0, 8, 0, 0x58, 2, 0, 0, 0, 0, 0, 0, // dead connection timeout
            12, 0, 5, 0, 0x0d, 1, 0, 0, 0, 0, 0, 0, // server flags
            12, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, // client flags
            8, 0, 10, 0, b'v', b'o', b'l', 0, // backend
            16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, fd[0], fd[1], fd[2], fd[3],
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_status_answer_lists_devices() {
        #[rustfmt::skip]
        let bytes = [
            64, 0, 0, 0, 0x1c, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
            5, 1, 0, 0,
            44, 0, 9, 0x80,
            20, 0, 1, 0x80, 8, 0, 1, 0, 3, 0, 0, 0, 5, 0, 2, 0, 1, 0, 0, 0,
            20, 0, 1, 0x80, 8, 0, 1, 0, 4, 0, 0, 0, 5, 0, 2, 0, 0, 0, 0, 0,
        ];
        let mut datagram = &bytes[..];
        let message = message::next_message(&mut datagram).unwrap().unwrap();
        let (three, four) = (
            DeviceStatus {
                index: 3,
                connected: true,
            },
            DeviceStatus {
                index: 4,
                connected: false,
            },
        );
        assert_eq!(parse_status(message).unwrap(), [three, four]);
    }

    #[test]
    fn what_the_driver_would_misread_is_refused_first() {
        connect().check(2).unwrap();
        type Spoil = fn(&mut Connect);
        let refused: [(&str, usize, Spoil); 9] = [
            ("sockets", 0, |_| ()),
            ("sockets", MAX_SOCKETS + 1, |_| ()),
            ("CAN_MULTI_CONN", 2, |c| c.server_flags = 1),
            ("block size 3000", 1, |c| c.block_size = 3000),
            ("block size 256", 1, |c| c.block_size = 256),
            ("multiple", 1, |c| c.size_bytes = 4097),
            ("size 0", 1, |c| c.size_bytes = 0),
            ("backend", 1, |c| c.backend = String::new()),
            ("backend", 1, |c| c.backend = "a\nb".to_owned()),
        ];
        for (word, sockets, spoil) in refused {
            let mut spoilt = connect();
            spoil(&mut spoilt);
            let error = spoilt.check(sockets).unwrap_err();
            assert!(matches!(error, KernelError::Invalid(_)), "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
