//! The rooms of `server/src` import only from rooms below them, and no two files import each other.
//!
//! Reads the source: every path that begins with `crate`, `super` or `self` in a `use` or anywhere
//! else is followed, through re-exports, to the file that defines the name.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Item, ItemMod, ItemUse, UseTree, Visibility};

/// Top floor first. A room may import from any room of a later floor.
const FLOORS: [&[&str]; 7] = [
    &["command"],
    &["export"],
    &["config"],
    &["door"],
    &["storage"],
    &["engine"],
    &["io", "request"],
];

/// Rooms within a room that must not know each other.
const APART: [(&str, &str); 1] = [("door::ublk", "door::vhost")];

/// A module path without `crate`: `door::vhost::queue`.
type Module = Vec<String>;

#[derive(Default)]
struct File {
    path: PathBuf,
    /// Names that the file re-exports (`pub use`), and where from. `*` stands for all.
    exports: Vec<(String, Module)>,
    /// What the file's code names, with the text of the path.
    uses: BTreeSet<Module>,
}

/// The modules of a tree of source files, without the tests in them.
struct Source(BTreeMap<Module, File>);

impl Source {
    fn read(root: &Path) -> Self {
        let mut source = Self(BTreeMap::new());
        source.add(Vec::new(), &root.join("lib.rs"), root);
        source
    }

    /// Adds the file of `module`, whose child modules are in `folder`, and its children.
    fn add(&mut self, module: Module, path: &Path, folder: &Path) {
        let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for item in &parsed.items {
            let Item::Mod(child) = item else { continue };
            if child.content.is_some() || is_test(&child.attrs) {
                continue;
            }
            let name = child.ident.to_string();
            let beside = folder.join(format!("{name}.rs"));
            let within = folder.join(&name);
            let file = match beside.exists() {
                true => beside,
                false => within.join("mod.rs"),
            };
            let mut child = module.clone();
            child.push(name);
            self.add(child, &file, &within);
        }
        let mut reader = Reader {
            module: module.clone(),
            file: File {
                path: path.to_owned(),
                ..File::default()
            },
        };
        reader.visit_file(&parsed);
        // What a file re-exports is not its own use of it, unless it has code that may use it.
        let is_code = |item: &Item| !matches!(item, Item::Mod(_) | Item::Use(_));
        if parsed.items.iter().any(is_code) {
            let exports = reader.file.exports.iter();
            let uses: Vec<_> = exports.map(|(_, from)| from.clone()).collect();
            reader.file.uses.extend(uses);
        }
        self.0.insert(module, reader.file);
    }

    /// The file that defines what `path` names: the longest prefix that is a module, or the module
    /// that a re-export leads to.
    fn definer(&self, path: &[String], depth: usize) -> Option<&Module> {
        let known = (0..=path.len()).rev();
        let (module, file) = known
            .map(|n| &path[..n])
            .find_map(|m| self.0.get_key_value(m))?;
        let Some(name) = path.get(module.len()).filter(|_| depth < 8) else {
            return Some(module);
        };
        let leads = file
            .exports
            .iter()
            .find(|(export, _)| export == name || export == "*");
        match leads {
            Some((_, from)) => {
                let mut from = from.clone();
                from.extend_from_slice(&path[module.len() + 1..]);
                self.definer(&from, depth + 1)
            }
            None => Some(module),
        }
    }

    /// Which file imports from which, each with one of the paths that say so.
    fn imports(&self) -> BTreeMap<&Module, BTreeMap<&Module, String>> {
        let mut imports = BTreeMap::<_, BTreeMap<_, _>>::new();
        for (module, file) in &self.0 {
            for path in &file.uses {
                if let Some(target) = self.definer(path, 0)
                    && target != module
                    && !target.is_empty()
                {
                    let text = format!("crate::{}", path.join("::"));
                    imports
                        .entry(module)
                        .or_default()
                        .entry(target)
                        .or_insert(text);
                }
            }
        }
        imports
    }

    fn name(&self, module: &Module) -> String {
        self.0[module].path.display().to_string()
    }
}

struct Reader {
    module: Module,
    file: File,
}

impl Reader {
    /// A path from the root of the crate, if `segments` name something of ours.
    fn absolute(&self, segments: &[String]) -> Option<Module> {
        let mut at = match segments.first()?.as_str() {
            "crate" => Vec::new(),
            "self" => self.module.clone(),
            "super" => self.module[..self.module.len().checked_sub(1)?].to_vec(),
            _ => return None,
        };
        for segment in &segments[1..] {
            match segment.as_str() {
                "super" => {
                    at.pop()?;
                }
                "self" => {}
                name => at.push(name.to_owned()),
            }
        }
        Some(at)
    }

    fn take_use(&mut self, tree: &UseTree, prefix: &mut Vec<String>, exported: bool) {
        match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.take_use(&path.tree, prefix, exported);
                prefix.pop();
            }
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.take_use(tree, prefix, exported);
                }
            }
            UseTree::Name(name) => self.take_name(prefix, &name.ident, &name.ident, exported),
            UseTree::Rename(name) => self.take_name(prefix, &name.ident, &name.rename, exported),
            UseTree::Glob(_) => {
                let star = syn::parse_quote!(all_of_it);
                self.take_name(prefix, &star, &star, exported);
            }
        }
    }

    fn take_name(
        &mut self,
        prefix: &[String],
        name: &syn::Ident,
        rename: &syn::Ident,
        exported: bool,
    ) {
        let mut segments = prefix.to_vec();
        let is_glob = name == "all_of_it";
        if name != "self" && !is_glob {
            segments.push(name.to_string());
        }
        // Paths in a `use` may also begin with a child module.
        let absolute = self.absolute(&segments).unwrap_or_else(|| {
            let mut path = self.module.clone();
            path.extend(segments);
            path
        });
        if exported {
            let rename = if is_glob {
                "*".to_owned()
            } else {
                rename.to_string()
            };
            self.file.exports.push((rename, absolute));
        } else {
            self.file.uses.insert(absolute);
        }
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if !is_test(&item.attrs) {
            let exported = !matches!(item.vis, Visibility::Inherited);
            self.take_use(&item.tree, &mut Vec::new(), exported);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<_> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if let Some(absolute) = self.absolute(&segments)
            && segments.len() > 1
        {
            self.file.uses.insert(absolute);
        }
        visit::visit_path(self, path);
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let text = match &attribute.meta {
            syn::Meta::List(list) => list.tokens.to_string(),
            _ => String::new(),
        };
        attribute.path().is_ident("cfg")
            && text
                .split(|c: char| !c.is_alphanumeric())
                .any(|w| w == "test")
    })
}

fn floor(module: &Module) -> usize {
    let room = &module[0];
    FLOORS
        .iter()
        .position(|rooms| rooms.contains(&room.as_str()))
        .unwrap_or_else(|| panic!("server/src/{room} is not one of the rooms in {FLOORS:?}"))
}

/// What is wrong with the imports of a tree of source files, one line each.
fn faults(source: &Source) -> Vec<String> {
    let mut faults = Vec::new();
    let imports = source.imports();
    for (from, targets) in &imports {
        // `lib.rs` and `main.rs` belong to no room.
        if from.is_empty() {
            continue;
        }
        for (to, path) in targets {
            let (here, there) = (source.name(from), source.name(to));
            let (above, below) = (floor(from), floor(to));
            if below < above || (below == above && from[0] != to[0]) {
                faults.push(format!(
                    "{here} imports {path} of {there}, which is not below it"
                ));
            }
            let (from, to) = (from.join("::"), to.join("::"));
            let crosses = |a: &str, b: &str| from.starts_with(a) && to.starts_with(b);
            if APART.iter().any(|(a, b)| crosses(a, b) || crosses(b, a)) {
                faults.push(format!(
                    "{here} imports {path} of {there}: they must not know each other"
                ));
            }
        }
    }
    // A circle: a file that reaches itself.
    for start in imports.keys() {
        let mut reached = BTreeMap::<&Module, &Module>::new();
        let mut next = vec![*start];
        while let Some(module) = next.pop() {
            for target in imports.get(module).into_iter().flat_map(BTreeMap::keys) {
                // The first way found stays: following it backwards leads to the start.
                if let Entry::Vacant(way) = reached.entry(target) {
                    way.insert(module);
                    next.push(target);
                }
            }
        }
        let Some(mut last) = reached.get(start).copied() else {
            continue;
        };
        let mut circle = vec![source.name(start)];
        while last != *start {
            circle.push(source.name(last));
            last = reached[last];
        }
        circle.reverse();
        // Each circle once: with its first file at the end.
        if circle.iter().all(|name| *name >= source.name(start)) {
            faults.push(format!("a circle of imports: {}", circle.join(" -> ")));
        }
    }
    faults
}

#[test]
fn rooms_import_only_from_rooms_below_and_files_in_no_circle() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let source = Source::read(&root);
    assert!(
        source.0.len() > 50,
        "only {} files were read",
        source.0.len()
    );
    let faults = faults(&source);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn an_import_upwards_across_or_in_a_circle_is_noticed() {
    let tree = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = tree.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("lib.rs", "pub mod door; pub mod engine; pub mod request;");
    write("door/mod.rs", "pub mod ublk; pub mod vhost;");
    write(
        "door/ublk.rs",
        "use crate::engine::Loop; fn f() { crate::door::vhost::open() }",
    );
    write(
        "door/vhost.rs",
        "pub fn open() {} #[cfg(test)] mod tests { use crate::door::ublk; }",
    );
    write("engine/mod.rs", "mod a; mod b; pub use a::Loop;");
    write("engine/a.rs", "use super::b::Part; pub struct Loop;");
    write(
        "engine/b.rs",
        "use super::Loop; use crate::request::Op; pub struct Part;",
    );
    write("request/mod.rs", "use crate::engine::Loop; pub struct Op;");
    let found = faults(&Source::read(tree.path()));
    let expected = [
        (
            "door/ublk.rs",
            "door/vhost.rs: they must not know each other",
        ),
        ("request/mod.rs", "engine/a.rs, which is not below it"),
        ("a circle of imports", "engine/b.rs"),
    ];
    for (subject, fault) in expected {
        let told = found
            .iter()
            .any(|line| line.contains(subject) && line.contains(fault));
        assert!(told, "{subject} … {fault}: {found:#?}");
    }
    assert_eq!(found.len(), expected.len(), "{found:#?}");
}
