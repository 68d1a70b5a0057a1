//! What a container's program is: the image's wishes, changed by its user's.

use crate::guest::{ProcessSpec, TerminalSize};
use crate::image::RunConfig;

use super::ContainerError;

/// What Docker's images take for granted.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the user wants otherwise than the image says.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// The command; the image's where it is empty.
    pub command: Vec<String>,
    /// Instead of the image's entry point; an empty text is none.
    pub entrypoint: Option<String>,
    /// `NAME=VALUE`, each in place of the image's.
    pub env: Vec<String>,
    /// The working folder.
    pub workdir: Option<String>,
    /// `USER[:GROUP]`.
    pub user: Option<String>,
    /// The program has a terminal.
    pub terminal: bool,
    /// It has input.
    pub input: bool,
    /// The terminal's size at first.
    pub size: Option<TerminalSize>,
}

/// The program of an image with this configuration, as Docker has it.
///
/// # Errors
/// Neither says a command.
pub fn plan(image: &RunConfig, changes: &Changes, hostname: &str) -> Result<ProcessSpec, ContainerError> {
    let mut args = match &changes.entrypoint {
        Some(entrypoint) => Some(entrypoint).filter(|text| !text.is_empty()).into_iter().cloned().collect(),
        None => image.entrypoint.clone().unwrap_or_default(),
    };
    // With an entry point of the user's own, the image's command is for another program.
    let command = match (&changes.entrypoint, changes.command.is_empty()) {
        (None, true) => image.cmd.clone().unwrap_or_default(),
        _ => changes.command.clone(),
    };
    args.extend(command);
    if args.is_empty() {
        return Err(ContainerError::NoCommand);
    }
    let mut env = vec![PATH.to_string(), format!("HOSTNAME={hostname}")];
    if changes.terminal {
        env.push("TERM=xterm".into());
    }
    let own = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    image.env.iter().flatten().chain(&changes.env).for_each(|word| set_variable(&mut env, word));
    Ok(ProcessSpec {
        args,
        env,
        cwd: own(&changes.workdir).or_else(|| own(&image.working_dir)).unwrap_or_else(|| "/".into()),
        user: own(&changes.user).or_else(|| own(&image.user)).unwrap_or_default(),
        terminal: changes.terminal,
        input: changes.input,
        size: changes.size,
    })
}

/// Sets a variable, which has one value.
pub fn set_variable(env: &mut Vec<String>, word: &str) {
    let name = word.split('=').next();
    env.retain(|other| other.split('=').next() != name);
    env.push(word.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(String::from).collect()
    }

    fn image() -> RunConfig {
        RunConfig {
            user: Some("web".into()),
            env: Some(words("PATH=/bin A=1")),
            entrypoint: Some(words("/entry -x")),
            cmd: Some(words("serve")),
            working_dir: Some("/srv".into()),
            ..RunConfig::default()
        }
    }

    fn args(change: impl FnOnce(&mut Changes)) -> String {
        let mut changes = Changes::default();
        change(&mut changes);
        plan(&image(), &changes, "h").unwrap().args.join(" ")
    }

    #[test]
    fn entry_point_and_command_are_dockers() {
        assert_eq!(args(|_| {}), "/entry -x serve");
        assert_eq!(args(|c| c.command = words("a b")), "/entry -x a b");
        assert_eq!(args(|c| c.entrypoint = Some("sh".into())), "sh");
        assert_eq!(args(|c| (c.entrypoint, c.command) = (Some("sh".into()), words("-c x"))), "sh -c x");
        assert_eq!(args(|c| (c.entrypoint, c.command) = (Some(String::new()), words("x"))), "x");
        let none = Changes { entrypoint: Some(String::new()), ..Changes::default() };
        assert!(matches!(plan(&image(), &none, "h"), Err(ContainerError::NoCommand)));
    }

    #[test]
    fn the_user_overrides_the_image() {
        let own = plan(&image(), &Changes::default(), "h").unwrap();
        assert_eq!(own.env, ["HOSTNAME=h", "PATH=/bin", "A=1"]);
        assert_eq!((own.cwd.as_str(), own.user.as_str()), ("/srv", "web"));
        let changes = Changes {
            env: words("A=2 B=x=y"),
            workdir: Some("/tmp".into()),
            user: Some("0".into()),
            terminal: true,
            ..Changes::default()
        };
        let changed = plan(&image(), &changes, "h").unwrap();
        assert_eq!(changed.env, ["HOSTNAME=h", "TERM=xterm", "PATH=/bin", "A=2", "B=x=y"]);
        assert_eq!((changed.cwd.as_str(), changed.user.as_str()), ("/tmp", "0"));
    }
}
