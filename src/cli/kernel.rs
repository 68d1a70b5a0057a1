//! `microvm kernel`: the guest kernels of this user.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::config::Size;
use crate::kernels::{Kernel, KernelStore};

use super::CliError;
use super::table::{self, Format};

const AFTER_HELP: &str =
    "Kernels are kept in $MICROVM_DATA, else in $XDG_DATA_HOME/microvm or ~/.local/share/microvm.

Exit status:
  0  done
  1  there is no such kernel, or a file fails
  2  wrong usage

Examples:
  microvm kernel import vmlinux --name tuned
  microvm kernel import bzImage --name stock --initrd modules.cpio
  microvm kernel ls
  microvm kernel default stock";

/// Words of `microvm kernel`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct KernelArgs {
    #[command(subcommand)]
    command: KernelCommand,
}

#[derive(Subcommand)]
enum KernelCommand {
    /// List the kernels
    #[command(visible_alias = "list")]
    Ls {
        /// Print names alone
        #[arg(short, long)]
        quiet: bool,
        /// How the list is written
        #[arg(long, value_name = "FORMAT", default_value = "table")]
        format: Format,
    },
    /// Keep a copy of a kernel; the first one becomes the default
    Import {
        /// An x86-64 ELF vmlinux or a bzImage
        file: PathBuf,
        /// What it is called [default: the file's name]
        #[arg(long)]
        name: Option<String>,
        /// An initramfs with its modules as /modules/NN-name.ko, loaded in this order, where its drivers are modules
        #[arg(long, value_name = "PATH")]
        initrd: Option<PathBuf>,
        /// Make it the default
        #[arg(long)]
        default: bool,
    },
    /// Choose the kernel that is booted where no other is named, or tell it
    Default {
        /// Its name
        name: Option<String>,
    },
    /// Remove kernels
    Rm {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

pub(super) fn run(args: &KernelArgs) -> Result<u8, CliError> {
    let store = KernelStore::of_user()?;
    let mut out = io::stdout().lock();
    match &args.command {
        KernelCommand::Ls { quiet, format } => {
            let kernels = store.list()?;
            match (format, quiet) {
                (_, true) => kernels.iter().try_for_each(|k| writeln!(out, "{}", k.name))?,
                (Format::Json, false) => writeln!(out, "{}", serde_json::json!(kernels))?,
                (Format::Table, false) => write_table(&kernels, &mut out)?,
            }
        }
        KernelCommand::Import { file, name, initrd, default } => {
            let file_name = || file.file_name().map(|name| name.to_string_lossy().into_owned());
            let name = name.clone().or_else(file_name).unwrap_or_default();
            let kernel = store.import(&name, file, initrd.as_deref())?;
            if *default {
                store.set_default(&name)?;
            }
            writeln!(out, "{}", kernel.name)?;
        }
        KernelCommand::Default { name: Some(name) } => store.set_default(name)?,
        KernelCommand::Default { name: None } => writeln!(out, "{}", store.default()?.name)?,
        KernelCommand::Rm { names } => {
            for name in names {
                store.remove(name)?;
                writeln!(out, "{name}")?;
            }
        }
    }
    Ok(0)
}

fn write_table(kernels: &[Kernel], out: &mut dyn Write) -> io::Result<()> {
    let row = |k: &Kernel| {
        let size = Size(k.bytes.next_multiple_of(1 << 20)).to_string();
        let initrd = if k.initrd.is_some() { "yes" } else { "-" };
        let default = if k.default { "yes" } else { "-" };
        [k.name.clone(), k.format.into(), size, initrd.into(), default.into()]
    };
    let head = ["NAME", "FORMAT", "SIZE", "MODULES", "DEFAULT"].map(String::from);
    table::write(std::iter::once(head).chain(kernels.iter().map(row)), out)
}
