//! What the guest has sent and the host program has not taken yet. Credit bounds it: see `credit.rs`.

use std::collections::VecDeque;
use std::io;

use super::credit::BUF_ALLOC;

/// A bounded queue of bytes. Empty, it takes no memory.
#[derive(Debug, Default)]
pub struct TxBuf(VecDeque<u8>);

impl TxBuf {
    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds bytes. `false`: they do not fit, and nothing was added.
    #[must_use]
    pub fn push(&mut self, data: &[u8]) -> bool {
        let fits = data.len() <= BUF_ALLOC as usize - self.0.len();
        if fits {
            self.0.extend(data);
        }
        fits
    }

    /// Gives the bytes to `write` until it takes no more, and says how many it took. Where it would block that is no error.
    ///
    /// # Errors
    /// What `write` says.
    pub fn flush(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<u32> {
        let mut taken = 0;
        while !self.0.is_empty() {
            match write(self.0.as_slices().0) {
                Ok(0) => break,
                Ok(len) => {
                    self.0.drain(..len);
                    taken += len as u32;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        if self.0.is_empty() {
            self.0 = VecDeque::new();
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_and_the_end_is_kept() {
        let mut buffer = TxBuf::default();
        let mut out = Vec::new();
        assert!(buffer.push(b"hello world"));
        let mut room = [3, 4, 0].into_iter();
        let taken = buffer.flush(|data| {
            let len = room.next().unwrap().min(data.len());
            out.extend(&data[..len]);
            if len == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(len) }
        });
        assert_eq!((taken.unwrap(), out.as_slice()), (7, &b"hello w"[..]));
        assert!(!buffer.is_empty());
    }

    #[test]
    fn it_has_a_bound() {
        let mut buffer = TxBuf::default();
        assert!(buffer.push(&vec![0; BUF_ALLOC as usize]));
        assert!(!buffer.push(&[0]));
        assert_eq!(buffer.flush(|data| Ok(data.len())).unwrap(), BUF_ALLOC);
        assert_eq!(buffer.0.capacity(), 0);
    }
}
