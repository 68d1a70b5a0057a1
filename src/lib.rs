//! `microvm`: a small virtual machine monitor for KVM.
//!
//! Data flows one way:
//!
//! ```text
//! command line -> config -> vmm::builder -> VM, vCPUs, devices -> event loop -> exit status
//! ```
//!
//! The modules below stand in layer order: a module may import only modules further down. `tests/layers.rs`
//! reads the `use crate::` lines and fails on an import that points up.

pub mod cli;

pub mod compare;

pub mod container;

pub mod doctor;
pub mod image;
pub mod kernels;

pub mod control;

pub mod vmm;

pub mod devices;

pub mod vcpu;
pub mod vm;

pub mod arch;

pub mod bus;
pub mod sandbox;

pub mod config;

pub mod guest;
pub mod logger;
pub mod metrics;
pub mod sys;
