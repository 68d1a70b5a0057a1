//! `microvm doctor`.
use super::CliError;
use clap::Args;
/// Flags of `microvm doctor`.
#[derive(Args)]
pub struct DoctorArgs {}
pub(super) fn run(_args: &DoctorArgs) -> Result<u8, CliError> {
    Ok(0)
}
