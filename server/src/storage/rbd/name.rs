//! Which image.

use std::path::PathBuf;

/// Which image, and how its cluster is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    /// The pool.
    pub pool: String,
    /// The namespace in it; empty for the default one.
    pub namespace: String,
    /// The image.
    pub image: String,
    /// A snapshot of it, which cannot be written to.
    pub snapshot: Option<String>,
    /// The configuration of the cluster; by default where Ceph looks for it.
    pub conf: Option<PathBuf>,
    /// The user, without `client.`; by default the one that Ceph takes.
    pub user: Option<String>,
}

impl std::fmt::Display for ImageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/", self.pool)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.image)?;
        match &self.snapshot {
            Some(snapshot) => write!(f, "@{snapshot}"),
            None => Ok(()),
        }
    }
}
