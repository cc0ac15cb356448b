//! Gives the C library its SONAME.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!(
        "cargo::rustc-cdylib-link-arg=-Wl,-soname,libupgrade_proto.so.{}",
        env!("CARGO_PKG_VERSION_MAJOR")
    );
}
