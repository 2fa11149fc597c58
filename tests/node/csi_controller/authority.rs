//! Clients that send the socket's path as `:authority`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::World;

/// A call of GetPluginInfo, byte by byte: no client of ours would send it so.
fn call_by(socket: &std::path::Path, authority: &str) -> u8 {
    let mut stream = UnixStream::connect(socket).expect("it listens");
    let frame = |kind: u8, flags: u8, id: u8, payload: &[u8]| {
        let len = u8::try_from(payload.len()).expect("short");
        let mut frame = vec![0, 0, len, kind, flags, 0, 0, 0, id];
        frame.extend_from_slice(payload);
        frame
    };
    let field = |first: &[u8], value: &str| {
        let mut field = first.to_vec();
        field.push(u8::try_from(value.len()).expect("short"));
        field.extend_from_slice(value.as_bytes());
        field
    };
    // :method POST, :scheme http, :path, :authority, content-type, te.
    let block = [
        vec![0x83, 0x86],
        field(&[0x44], "/csi.v1.Identity/GetPluginInfo"),
        field(&[0x41], authority),
        field(&[0x5f], "application/grpc"),
        field(&[0x40, 2, b't', b'e'], "trailers"),
    ];
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frame(1, 0x4, 1, &block.concat()));
    bytes.extend(frame(0, 0x1, 1, &[0, 0, 0, 0, 0]));
    stream.write_all(&bytes).expect("sent");
    // The kind of the first frame about our stream.
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).expect("a frame");
        let len = usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; len];
        stream.read_exact(&mut payload).expect("its payload");
        if head[8] == 1 {
            return head[3];
        }
    }
}

#[test]
fn a_socket_path_as_authority_is_no_reason_to_refuse() {
    const HEADERS: u8 = 1;
    let world = World::start();
    for authority in [
        "localhost",
        "/csi/csi.sock",
        "%2Fcsi%2Fcsi.sock",
        "unix:///csi/csi.sock",
    ] {
        assert_eq!(call_by(&world.socket, authority), HEADERS, "{authority}");
    }
}
