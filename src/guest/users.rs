//! Who a program runs as: `USER[:GROUP]` as images and flags say it, looked up in the container's own `/etc`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

/// The highest number of a user or group, as with Docker. One of 32 bits means "no change" to system calls: the program
/// would stay root.
const MAX_NUMBER: u32 = i32::MAX as u32;
/// Lines longer than this are no entries; a database may be as long as it likes.
const MAX_LINE: usize = 64 << 10;

/// A user's numbers and home.
#[derive(Debug, PartialEq, Eq)]
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// The group's.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Where HOME points.
    pub home: String,
}

/// Looks `text` up in the databases below `etc`. As Docker: numbers need not be there; with a group of its own a user
/// has no supplementary ones; without one the user's entry says which, or it is 0.
///
/// # Errors
/// A name that is not there, in words.
pub fn find(text: &str, etc: &Path) -> Result<User, String> {
    find_in(text, |name| File::open(etc.join(name)).ok())
}

/// The same in databases that `open` opens by their names, if they are there.
///
/// # Errors
/// As for [`find`].
pub fn find_in<R: Read>(text: &str, open: impl Fn(&str) -> Option<R>) -> Result<User, String> {
    let user = look_up(text, &open)?;
    if user.uid.max(user.gid) > MAX_NUMBER {
        return Err(format!("user {text:?}: numbers of users and groups go up to {MAX_NUMBER}"));
    }
    Ok(user)
}

fn look_up<R: Read>(text: &str, open: &impl Fn(&str) -> Option<R>) -> Result<User, String> {
    let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    // NAME:PASSWORD:UID:GID:COMMENT:HOME:SHELL
    let entry = entries(open("passwd"))
        .find(|e| field(e, 0) == user || number.is_some_and(|n| field(e, 2).parse() == Ok(n)));
    let in_entry = |n| entry.as_ref().and_then(|e| field(e, n).parse::<u32>().ok());
    let uid = in_entry(2).or(number).ok_or_else(|| format!("there is no user {user:?} in /etc/passwd"))?;
    let home = entry.as_ref().map_or("/", |e| field(e, 5));
    let home = if home.is_empty() { "/" } else { home }.to_string();
    match group.filter(|g| !g.is_empty()) {
        Some(group) => Ok(User { uid, gid: find_group(group, open)?, groups: Vec::new(), home }),
        None => {
            let groups = entry.as_ref().map_or_else(Vec::new, |e| groups_of(field(e, 0), open));
            Ok(User { uid, gid: in_entry(3).unwrap_or(0), groups, home })
        }
    }
}

fn find_group<R: Read>(group: &str, open: &impl Fn(&str) -> Option<R>) -> Result<u32, String> {
    // NAME:PASSWORD:GID:MEMBER,MEMBER
    let entry = entries(open("group")).find(|e| field(e, 0) == group);
    let gid = entry.and_then(|e| field(&e, 2).parse().ok());
    gid.or_else(|| group.parse().ok()).ok_or_else(|| format!("there is no group {group:?} in /etc/group"))
}

fn groups_of<R: Read>(user: &str, open: &impl Fn(&str) -> Option<R>) -> Vec<u32> {
    let with_user = entries(open("group")).filter(|e| field(e, 3).split(',').any(|member| member == user));
    with_user.filter_map(|e| field(&e, 2).parse().ok()).filter(|gid| *gid <= MAX_NUMBER).collect()
}

fn field(entry: &str, number: usize) -> &str {
    entry.split(':').nth(number).unwrap_or_default().trim()
}

fn entries<R: Read>(database: Option<R>) -> impl Iterator<Item = String> {
    let file = database.map(BufReader::new);
    file.into_iter().flat_map(|mut file| std::iter::from_fn(move || next_line(&mut file).ok().flatten()))
}

/// `None` at the end. What is not UTF-8 is no entry, but not the end either.
fn next_line(file: &mut BufReader<impl Read>) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let count = io::Read::take(&mut *file, MAX_LINE as u64).read_until(b'\n', &mut line)?;
    Ok((count > 0).then(|| String::from_utf8(line).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etc() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let passwd = "root:x:0:0:root:/root:/bin/sh\n\nbroken\nweb:x:33:34::/var/www:\nbare:x:7:8\n";
        std::fs::write(dir.path().join("passwd"), passwd).unwrap();
        std::fs::write(dir.path().join("group"), b"root:x:0:\nlog:x:4:root,web\nweb:x:34:\n\xff\n").unwrap();
        dir
    }

    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> Result<User, String> {
        Ok(User { uid, gid, groups: groups.into(), home: home.into() })
    }

    #[test]
    fn names_and_numbers_are_found() {
        let etc = etc();
        for (text, expected) in [
            ("", user(0, 0, &[4], "/root")),
            ("web", user(33, 34, &[4], "/var/www")),
            ("33", user(33, 34, &[4], "/var/www")),
            ("web:log", user(33, 4, &[], "/var/www")),
            ("web:", user(33, 34, &[4], "/var/www")),
            (":7", user(0, 7, &[], "/root")),
            ("1000", user(1000, 0, &[], "/")),
            ("1000:1000", user(1000, 1000, &[], "/")),
            ("bare", user(7, 8, &[], "/")),
        ] {
            assert_eq!(find(text, etc.path()), expected, "{text}");
        }
        assert!(find("nobody", etc.path()).unwrap_err().contains("\"nobody\""));
        assert!(find("web:nobody", etc.path()).unwrap_err().contains("group \"nobody\""));
        assert!(find("-1", etc.path()).is_err());
        assert!(find("99999999999", etc.path()).is_err());
        // To setresuid(2) it is "no change".
        for last in ["4294967295", "1:4294967295"] {
            assert!(find(last, etc.path()).unwrap_err().contains("2147483647"), "{last}");
        }
    }

    #[test]
    fn an_image_without_databases_has_numbers() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find("", dir.path()), user(0, 0, &[], "/"));
        assert_eq!(find("5:6", dir.path()), user(5, 6, &[], "/"));
    }
}
