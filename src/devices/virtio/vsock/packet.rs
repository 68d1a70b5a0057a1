//! Packet headers (virtio 1.3 §5.10.6): 44 bytes, little-endian, copied once and then checked.

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;

/// The host's CID (§5.10.4).
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the one type here.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_RECEIVE`: the sender of the packet receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_SEND`: the sender of the packet sends no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for (§5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// There is no connection, or none any more.
    Reset = 3,
    /// One or both directions end.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// Tells how much may be sent.
    CreditUpdate = 6,
    /// Asks for that.
    CreditRequest = 7,
}

impl Op {
    /// `None`: an operation that does not exist.
    #[must_use]
    pub fn new(number: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|op| *op as u16 == number)
    }
}

/// A header as it was copied from the guest, or as it goes there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// Kind of socket.
    pub kind: u16,
    /// An [`Op`], or anything else that a guest writes.
    pub op: u16,
    /// Of a shutdown: which directions.
    pub flags: u32,
    /// Bytes that the sender can hold for this connection.
    pub buf_alloc: u32,
    /// Bytes that it has handed on so far, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn parse(raw: &[u8; HEADER_LEN]) -> Self {
        fn at<const N: usize>(raw: &[u8; HEADER_LEN], from: usize) -> [u8; N] {
            std::array::from_fn(|i| raw[from + i])
        }
        Self {
            src_cid: u64::from_le_bytes(at(raw, 0)),
            dst_cid: u64::from_le_bytes(at(raw, 8)),
            src_port: u32::from_le_bytes(at(raw, 16)),
            dst_port: u32::from_le_bytes(at(raw, 20)),
            len: u32::from_le_bytes(at(raw, 24)),
            kind: u16::from_le_bytes(at(raw, 28)),
            op: u16::from_le_bytes(at(raw, 30)),
            flags: u32::from_le_bytes(at(raw, 32)),
            buf_alloc: u32::from_le_bytes(at(raw, 36)),
            fwd_cnt: u32::from_le_bytes(at(raw, 40)),
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        raw
    }

    /// The reset that answers it: back to where it came from, of the type that it claims (§5.10.6.4.2).
    #[must_use]
    pub fn reset_reply(self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_parse_and_print_back(bytes: Vec<u8>) {
            let mut raw = [0; HEADER_LEN];
            raw.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
            prop_assert_eq!(Header::parse(&raw).to_bytes(), raw);
        }

        #[test]
        fn an_op_is_its_number(number: u16) {
            prop_assert_eq!(Op::new(number).map(|op| op as u16), (1..=7).contains(&number).then_some(number));
        }
    }

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let raw = std::array::from_fn(|i| i as u8);
        let header = Header::parse(&raw);
        assert_eq!((header.src_cid, header.dst_port), (0x0706_0504_0302_0100, 0x1716_1514));
        assert_eq!((header.kind, header.op, header.fwd_cnt), (0x1d1c, 0x1f1e, 0x2b2a_2928));
    }
}
