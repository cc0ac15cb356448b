use std::io::Write;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
use vhost::vhost_user::message::VhostUserU64;

use super::*;

const GET_FEATURES: u32 = FrontendReq::GET_FEATURES as u32;
const SET_STATUS: u32 = FrontendReq::SET_STATUS as u32;

/// Sends one byte with so many descriptors.
fn pass(stream: &UnixStream, byte: u8, count: usize) {
    let fds = vec![stream.as_fd(); count];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PASSED))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let bytes = [byte];
    sendmsg(
        stream,
        &[IoSlice::new(&bytes)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
}

fn refused<T>(result: Result<T>) -> String {
    match result {
        Err(Error::Refused(error)) => error.to_string(),
        Err(Error::Disconnected) => panic!("the client has not hung up"),
        Ok(_) => panic!("it was taken"),
    }
}

#[test]
fn a_message_is_read_with_the_descriptors_of_all_its_pieces() {
    let (mut client, server) = UnixStream::pair().unwrap();
    let header = header(SET_STATUS, VERSION | 8, 8);
    pass(&client, header[0], 1);
    client.write_all(&header[1..]).unwrap();
    pass(&client, 7, 2);
    client.write_all(&[0; 7]).unwrap();
    // The next one has none of them.
    client
        .write_all(&super::header(GET_FEATURES, VERSION, 0))
        .unwrap();
    let mut message = Message::receive(&server).unwrap();
    assert_eq!(
        (message.request as u32, message.need_reply),
        (SET_STATUS, true)
    );
    assert_eq!(message.files.len(), 3);
    assert!(refused(message.body::<VhostUserU64>()).contains("3 descriptors"));
    message.files.clear();
    assert_eq!(message.body::<VhostUserU64>().unwrap().value, 7);
    assert!(Message::receive(&server).unwrap().files.is_empty());
    drop(client);
    assert!(matches!(
        Message::receive(&server),
        Err(Error::Disconnected)
    ));
}

#[test]
fn what_is_no_message_is_refused_by_its_header() {
    let cases = [
        ("unknown number 0", header(0, VERSION, 0)),
        ("unknown number 1000", header(1000, VERSION, 0)),
        (
            "GET_FEATURES with the flags 0x0",
            header(GET_FEATURES, 0, 0),
        ),
        ("with the flags 0x2", header(GET_FEATURES, 2, 0)),
        ("with the flags 0x5", header(GET_FEATURES, VERSION | 4, 0)),
        ("with the flags 0x11", header(GET_FEATURES, VERSION | 16, 0)),
        (
            "with 4097 bytes",
            header(SET_STATUS, VERSION, MAX_MSG_SIZE + 1),
        ),
        (
            "with 4294967295 bytes",
            header(SET_STATUS, VERSION, usize::MAX),
        ),
    ];
    for (wanted, header) in cases {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&header).unwrap();
        let error = refused(Message::receive(&server));
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
}

#[test]
fn descriptors_beyond_the_most_of_a_message_are_refused_however_they_come() {
    for (first, second, fits) in [
        (32, 0, true),
        (33, 0, false),
        (MAX_PASSED, 0, false),
        (30, 3, false),
    ] {
        let (mut client, server) = UnixStream::pair().unwrap();
        let header = header(GET_FEATURES, VERSION, 0);
        pass(&client, header[0], first);
        if second > 0 {
            pass(&client, header[1], second);
        }
        let sent = 1 + usize::from(second > 0);
        client.write_all(&header[sent..]).unwrap();
        let received = Message::receive(&server);
        if fits {
            assert_eq!(received.unwrap().files.len(), first);
        } else {
            assert!(
                refused(received).contains("more than 32"),
                "{first} {second}"
            );
        }
    }
}

#[test]
fn a_message_that_ends_too_early_is_no_orderly_end() {
    let whole = [&header(SET_STATUS, VERSION, 8)[..], &[0; 8]].concat();
    for cut in [1, 11, 12, 19] {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&whole[..cut]).unwrap();
        drop(client);
        assert_eq!(refused(Message::receive(&server)), CUT_SHORT, "{cut}");
    }
}
