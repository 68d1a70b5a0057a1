//! Flow control (virtio 1.3 §5.10.6.3): no side sends more than the other has room for.
//!
//! All counters count bytes modulo 2³² and are compared by their difference, so that they may wrap. What the guest
//! claims is believed only as far as it limits us: a lie makes its own connection wait.

/// Bytes from the guest that a connection holds for a host program which does not read. With
/// [`super::muxer::MAX_CONNECTIONS`] this bounds all memory: 64 MiB, and nothing until a program is slow.
pub const BUF_ALLOC: u32 = 64 << 10;

/// The guest is told of freed room when this much was freed: often enough that it never waits for a program that reads.
const ANNOUNCE: u32 = BUF_ALLOC / 4;

/// The credit of one connection, both ways.
#[derive(Clone, Copy, Debug, Default)]
pub struct Credit {
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Bytes received from the guest.
    received: u32,
    /// Of these, bytes handed on to the host program.
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    announced: u32,
}

impl Credit {
    /// Takes over what a packet says of its sender's room. `true`: there is more than before.
    pub fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) -> bool {
        let before = self.can_send();
        (self.peer_buf_alloc, self.peer_fwd_cnt) = (buf_alloc, fwd_cnt);
        self.can_send() > before
    }

    /// Bytes that may be sent to the guest now.
    #[must_use]
    pub fn can_send(&self) -> u32 {
        // A forged `fwd_cnt` ahead of `sent` looks like nearly 2³² bytes under way: no credit.
        self.peer_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// Counts bytes that go to the guest, at most [`Credit::can_send`].
    pub fn send(&mut self, len: u32) {
        debug_assert!(len <= self.can_send());
        self.sent = self.sent.wrapping_add(len);
    }

    /// Counts bytes that came from the guest. `false`: it was never given room for them.
    #[must_use]
    pub fn receive(&mut self, len: u32) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        let fits = len <= BUF_ALLOC.saturating_sub(held);
        if fits {
            self.received = self.received.wrapping_add(len);
        }
        fits
    }

    /// Counts bytes that the host program took. `true`: the guest should hear of it.
    pub fn forward(&mut self, len: u32) -> bool {
        self.forwarded = self.forwarded.wrapping_add(len);
        self.forwarded.wrapping_sub(self.announced) >= ANNOUNCE
    }

    /// `buf_alloc` and `fwd_cnt` of a packet to the guest, which is thereby told.
    pub fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (BUF_ALLOC, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counters_wrap() {
        let near = u32::MAX - 10;
        let mut credit =
            Credit { sent: near, peer_fwd_cnt: near, received: near, forwarded: near, ..Credit::default() };
        assert!(credit.hear(100, near));
        credit.send(50);
        assert_eq!(credit.can_send(), 50);
        credit.hear(100, near.wrapping_add(50));
        assert_eq!(credit.can_send(), 100);
        assert!(credit.receive(BUF_ALLOC));
        assert!(!credit.receive(1));
        credit.forward(20);
        assert!(credit.receive(20));
        assert!(!credit.receive(1));
    }

    #[test]
    fn a_lie_gives_no_credit() {
        let mut credit = Credit::default();
        credit.hear(1000, 5);
        assert_eq!(credit.can_send(), 0);
        credit.hear(0, 0);
        assert_eq!(credit.can_send(), 0);
    }

    proptest! {
        /// Whatever the guest claims and sends, no more is under way than it granted last, and no more is held than we did.
        #[test]
        fn nothing_passes_what_was_granted(start: u32, steps: Vec<(u8, u32, u32)>) {
            let mut credit = Credit { sent: start, peer_fwd_cnt: start, received: start, forwarded: start, ..Credit::default() };
            let mut held = 0u64;
            for (kind, a, b) in steps {
                match kind % 4 {
                    0 => { credit.hear(a, b); }
                    1 => {
                        let len = a.min(credit.can_send());
                        credit.send(len);
                        if len > 0 {
                            prop_assert!(credit.sent.wrapping_sub(credit.peer_fwd_cnt) <= credit.peer_buf_alloc);
                        }
                    }
                    2 => {
                        let len = a % (BUF_ALLOC + 2);
                        let fits = credit.receive(len);
                        prop_assert_eq!(fits, held + u64::from(len) <= u64::from(BUF_ALLOC));
                        held += if fits { u64::from(len) } else { 0 };
                    }
                    _ => {
                        let len = u64::from(a).min(held);
                        credit.forward(len as u32);
                        held -= len;
                    }
                }
                prop_assert!(held <= u64::from(BUF_ALLOC));
            }
        }

        /// With a guest that tells the truth, counters modulo 2³² give what counters without end would, however often
        /// they have wrapped; and it hears of freed room before it has to wait for ever.
        #[test]
        fn counters_modulo_are_exact_for_an_honest_guest(
            start: u32,
            buf_alloc in 0u32..1 << 20,
            steps: Vec<(bool, u32)>,
        ) {
            let mut credit = Credit { sent: start, peer_fwd_cnt: start, received: start, ..Credit::default() };
            (credit.forwarded, credit.announced) = (start, start);
            credit.hear(buf_alloc, start);
            // To the guest, and from it: bytes sent and of these taken.
            let (mut sent, mut taken) = (0u64, 0u64);
            let (mut received, mut forwarded, mut told) = (0u64, 0u64, 0u64);
            for (to_guest, len) in steps {
                if to_guest {
                    prop_assert_eq!(u64::from(credit.can_send()), u64::from(buf_alloc) - (sent - taken));
                    let len = len % (credit.can_send() + 1);
                    credit.send(len);
                    sent += u64::from(len);
                    taken += (sent - taken) / 2;
                    credit.hear(buf_alloc, start.wrapping_add(taken as u32));
                } else {
                    // It sends all that it may, and the program takes a part.
                    let room = u64::from(BUF_ALLOC) - (received - told);
                    prop_assert!(credit.receive(room as u32));
                    received += room;
                    let len = u64::from(len) % (received - forwarded + 1);
                    forwarded += len;
                    let is_told = credit.forward(len as u32);
                    if is_told {
                        prop_assert_eq!(credit.announce(), (BUF_ALLOC, start.wrapping_add(forwarded as u32)));
                        told = forwarded;
                    }
                    // A guest without room would wait until the program has taken everything at the latest.
                    prop_assert!(is_told || forwarded < received);
                }
            }
        }
    }
}
