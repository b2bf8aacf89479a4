//! The Hugging Face hub: what a revision holds, and its files in the cache that Python's huggingface_hub
//! shares (models--owner--name/{refs,blobs,snapshots}). Routes and cache paths are those of the hf-hub
//! crate; its own download neither checks what it got nor resumes safely nor takes Python's locks, so
//! the transfer is hub_transfer.rs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::api::RepoInfo;
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;
use serde_json::{json, Value};
use ureq::tls::{parse_pem, PemItem, RootCerts, TlsConfig};
use ureq::Agent;

use crate::hub_transfer::{self, Problem};
use crate::{guarded, text, SimpoBytes};

/// An error with the number of its absl::StatusCode.
pub struct Failure {
    pub code: i32,
    pub message: String,
}

pub const INVALID_ARGUMENT: i32 = 3;
pub const NOT_FOUND: i32 = 5;
pub const PERMISSION_DENIED: i32 = 7;
pub const RESOURCE_EXHAUSTED: i32 = 8;
pub const INTERNAL: i32 = 13;
pub const UNAVAILABLE: i32 = 14;
pub const DATA_LOSS: i32 = 15;

pub fn fail<T>(code: i32, message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure { code, message: message.into() })
}

/// What the C++ side asks for; see hf_ffi.h.
#[derive(Deserialize)]
pub struct Request {
    kind: String, // model, dataset
    repo: String, // owner/name
    revision: String,
    #[serde(default)]
    cache_only: bool,
    #[serde(default)]
    commit: String,
    #[serde(default)]
    files: Vec<String>,
}

impl Request {
    pub fn parse(text: &str) -> Result<Request, Failure> {
        let request: Request =
            serde_json::from_str(text).map_err(|e| Failure { code: INTERNAL, message: format!("hub request: {e}") })?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        let revision = &request.revision;
        if revision.is_empty() || !revision.chars().all(plain) || !is_safe_path(revision) {
            return fail(
                INVALID_ARGUMENT,
                format!("'{revision}' is not a revision: give a branch, a tag or a commit hash of {}", request.repo),
            );
        }
        Ok(request)
    }

    fn repo_at(&self, revision: &str) -> Repo {
        let kind = if self.kind == "dataset" { RepoType::Dataset } else { RepoType::Model };
        Repo::with_revision(self.repo.clone(), kind, revision.to_string())
    }

    fn name(&self) -> String {
        format!("{} {}", if self.kind == "dataset" { "data set" } else { "model" }, self.repo)
    }
}

/// A path that stays inside its folder.
fn is_safe_path(path: &str) -> bool {
    !path.is_empty() && !path.contains("//") && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A variable's value; set to nothing is not set.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn path_variable(name: &str) -> Option<PathBuf> {
    let value = variable(name)?;
    match (value.strip_prefix("~/"), variable("HOME")) {
        (Some(rest), Some(home)) => Some(Path::new(&home).join(rest)),
        _ => Some(value.into()),
    }
}

/// The settings of the environment, as huggingface_hub reads them.
pub struct Hub {
    pub endpoint: String,
    pub agent: Agent,
    pub token: Option<String>,
    token_path: PathBuf,
    cache: Cache,
    api: Api,
    offline: bool,
}

impl Hub {
    pub fn from_env() -> Result<Hub, Failure> {
        let home = path_variable("HF_HOME")
            .or_else(|| path_variable("XDG_CACHE_HOME").map(|path| path.join("huggingface")))
            .or_else(|| path_variable("HOME").map(|path| path.join(".cache/huggingface")));
        let Some(home) = home else {
            return fail(NOT_FOUND, "no folder for the hub's cache: set HF_HOME");
        };
        let cache_dir = path_variable("HF_HUB_CACHE")
            .or_else(|| path_variable("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        // Links in the cache are relative, so the folder itself may be given relative to anything.
        let cache_dir = std::path::absolute(&cache_dir).unwrap_or(cache_dir);
        let token_path = path_variable("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = variable("HF_TOKEN")
            .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| fs::read_to_string(&token_path).ok())
            .map(|token| token.trim().to_string())
            .filter(|token| !token.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let endpoint = endpoint.trim_end_matches('/').to_string();
        let api = ApiBuilder::from_cache(Cache::new(cache_dir.clone()))
            .with_endpoint(endpoint.clone())
            .with_progress(false)
            .build()
            .map_err(|e| Failure { code: INTERNAL, message: format!("hub client: {e}") })?;
        let is_true = |name: &str| {
            variable(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
        };
        Ok(Hub {
            endpoint,
            agent: make_agent()?,
            token,
            token_path,
            cache: Cache::new(cache_dir),
            api,
            offline: is_true("HF_HUB_OFFLINE") || is_true("TRANSFORMERS_OFFLINE"),
        })
    }

    fn repo_folder(&self, repo: &Repo) -> PathBuf {
        self.cache.path().join(repo.folder_name())
    }

    fn snapshot(&self, request: &Request, commit: &str) -> PathBuf {
        self.cache.repo(request.repo_at(commit)).pointer_path(commit)
    }

    /// The commit that the cache last saw behind a revision.
    fn cached_commit(&self, request: &Request) -> Option<String> {
        if is_commit(&request.revision) {
            return Some(request.revision.clone());
        }
        let path = self.repo_folder(&request.repo_at("main")).join("refs").join(&request.revision);
        let commit = fs::read_to_string(path).ok()?.trim().to_string();
        is_commit(&commit).then_some(commit)
    }

    fn is_cached(&self, request: &Request, commit: &str) -> bool {
        self.saved_listing(request, commit).is_some() || self.snapshot(request, commit).is_dir()
    }

    /// The files of a revision as the cache has them. `why` says why the hub is not asked.
    fn list_cached(&self, request: &Request, why: &str) -> Result<Value, Failure> {
        let folder = self.repo_folder(&request.repo_at("main"));
        let cached = self.cached_commit(request).map(|commit| (self.snapshot(request, &commit), commit));
        let Some((snapshot, commit)) = cached.filter(|(_, commit)| self.is_cached(request, commit)) else {
            return fail(
                if self.offline || request.cache_only { NOT_FOUND } else { UNAVAILABLE },
                format!(
                    "{}, revision {}: {why}, and it is not in the cache ({}). Fetch it where the hub can be reached, \
                     with `simpo-worker prepare --job ...` or `hf download {}{}`",
                    request.name(),
                    request.revision,
                    folder.display(),
                    request.repo,
                    if request.kind == "dataset" { " --repo-type dataset" } else { "" }
                ),
            );
        };
        let mut present = Vec::new();
        walk(&snapshot, "", &mut present);
        let files = self.saved_listing(request, &commit).unwrap_or_else(|| present.clone());
        Ok(json!({"commit": commit, "folder": snapshot, "files": files, "present": present, "why_cached": why}))
    }

    /// The list of a commit's files is kept beside its snapshot, which holds only those that were fetched:
    /// so a download that was cut is never taken for the whole.
    fn listing_path(&self, request: &Request, commit: &str) -> PathBuf {
        self.repo_folder(&request.repo_at(commit)).join(".listings").join(format!("{commit}.json"))
    }

    /// Ours, or the one that huggingface_hub keeps of a whole snapshot that it was asked for.
    fn saved_listing(&self, request: &Request, commit: &str) -> Option<Vec<String>> {
        let read = |path: &Path| serde_json::from_str::<Value>(&fs::read_to_string(path).ok()?).ok();
        if let Some(Value::Array(names)) = read(&self.listing_path(request, commit)) {
            return Some(names.iter().filter_map(|name| Some(name.as_str()?.to_string())).collect());
        }
        let trees = self.repo_folder(&request.repo_at(commit)).join("trees");
        let tree = read(&trees.join(format!("{commit}.json")))?;
        Some(tree["files"].as_object()?.keys().cloned().collect())
    }

    /// What a revision holds: its commit, its files, and the folder where they are or will be.
    pub fn list(&self, request: &Request) -> Result<Value, Failure> {
        if self.offline {
            return self.list_cached(request, "HF_HUB_OFFLINE is set");
        }
        if request.cache_only {
            return self.list_cached(request, "only the first rank of a machine asks the hub");
        }
        // A commit never changes.
        let saved = is_commit(&request.revision).then(|| self.saved_listing(request, &request.revision)).flatten();
        if let Some(files) = saved {
            let folder = self.snapshot(request, &request.revision);
            return Ok(json!({"commit": request.revision, "folder": folder, "files": files}));
        }
        let repo = request.repo_at(&request.revision);
        let url = format!("{}/api/{}", self.endpoint, repo.api_url());
        // Where the cache can answer, a machine without a network does not wait long.
        let cached = self.cached_commit(request).is_some_and(|commit| self.is_cached(request, &commit));
        let text = match hub_transfer::get_text(self, &url, if cached { 2 } else { hub_transfer::TRIES }) {
            Ok(text) => text,
            Err(Problem::Status(answer)) => return Err(self.refusal(request, "", answer)),
            Err(problem) => {
                let why = format!("{} cannot be used ({})", self.endpoint, problem.message());
                return self.list_cached(request, &why);
            }
        };
        let info: RepoInfo = serde_json::from_str(&text).map_err(|e| Failure {
            code: UNAVAILABLE,
            message: format!("{url}: not the answer of a hub ({e}); check HF_ENDPOINT"),
        })?;
        if !is_commit(&info.sha) {
            return fail(UNAVAILABLE, format!("{url}: '{}' is not a commit hash; check HF_ENDPOINT", info.sha));
        }
        let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        replace(&self.listing_path(request, &info.sha), &json!(files).to_string())?;
        if request.revision != info.sha {
            replace(&self.repo_folder(&repo).join("refs").join(&request.revision), &info.sha)?;
        }
        Ok(json!({"commit": info.sha, "folder": self.snapshot(request, &info.sha), "files": files}))
    }

    /// Brings files of a commit into its snapshot folder; those that are there cost nothing.
    pub fn fetch(&self, request: &Request) -> Result<Value, Failure> {
        if !is_commit(&request.commit) {
            return fail(INTERNAL, format!("'{}' is not a commit hash", request.commit));
        }
        let repo = request.repo_at(&request.commit);
        let snapshot = self.snapshot(request, &request.commit);
        let folder = self.repo_folder(&repo);
        let mut missing = Vec::new();
        for name in &request.files {
            if !is_safe_path(name) {
                return fail(INVALID_ARGUMENT, format!("{}: '{name}' is not a file's name", request.name()));
            }
            if snapshot.join(name).exists() {
                continue;
            }
            let url = self.api.repo(repo.clone()).url(&escape(name));
            let found = hub_transfer::ask_file(self, &url).map_err(|problem| self.explain(request, name, problem))?;
            missing.push((name, url, found));
        }
        let bytes: u64 = missing.iter().map(|(_, _, file)| file.size).sum();
        hub_transfer::check_space(&folder, bytes)?;
        for (name, url, file) in &missing {
            let blob = folder.join("blobs").join(&file.etag);
            let lock = self.cache.path().join(".locks").join(repo.folder_name()).join(format!("{}.lock", file.etag));
            hub_transfer::fetch_blob(self, name, url, file, &blob, &lock)
                .map_err(|problem| self.explain(request, name, problem))?;
            link(&blob, &snapshot, name).map_err(|e| hub_transfer::disk_failure(&snapshot.join(name), &e))?;
        }
        Ok(json!({"fetched": missing.len(), "bytes": bytes}))
    }

    /// The pull request in which the hub's own bot offers the weights as safetensors.
    pub fn conversion(&self, request: &Request) -> Result<Value, Failure> {
        if self.offline || request.cache_only {
            return self.cached_conversion(request);
        }
        let mut closed = Value::Null;
        for page in 0..20 {
            let url = format!("{}/api/models/{}/discussions?p={page}", self.endpoint, request.repo);
            let text = hub_transfer::get_text(self, &url, hub_transfer::TRIES)
                .map_err(|problem| self.explain(request, "", problem))?;
            let answer: Value = serde_json::from_str(&text).unwrap_or_default();
            let discussions = answer["discussions"].as_array().cloned().unwrap_or_default();
            for item in &discussions {
                // Anyone may open a pull request; only the bot's is known to be these same weights.
                let is_conversion = item["isPullRequest"] == true
                    && item["author"]["name"] == "SFconvertbot"
                    && item["title"].as_str().is_some_and(|title| title.starts_with("Adding `safetensors` variant"));
                let (true, Some(number)) = (is_conversion, item["num"].as_u64()) else { continue };
                let revision = json!(format!("refs/pr/{number}"));
                if item["status"] == "closed" {
                    closed = revision;
                } else {
                    return Ok(json!({"revision": revision}));
                }
            }
            if discussions.is_empty() {
                break;
            }
        }
        Ok(json!({"closed": closed}))
    }

    /// The newest pull request in the cache; it is there because an earlier run was led to it.
    fn cached_conversion(&self, request: &Request) -> Result<Value, Failure> {
        let folder = self.repo_folder(&request.repo_at("main")).join("refs/refs/pr");
        let numbers = fs::read_dir(folder).into_iter().flatten().flatten();
        let newest = numbers.filter_map(|item| item.file_name().to_str()?.parse::<u64>().ok()).max();
        Ok(newest.map_or(json!({}), |number| json!({"revision": format!("refs/pr/{number}")})))
    }

    fn explain(&self, request: &Request, file: &str, problem: Problem) -> Failure {
        let place = if file.is_empty() { request.name() } else { format!("{}, file {file}", request.name()) };
        match problem {
            Problem::Status(answer) => self.refusal(request, file, answer),
            Problem::Fatal(failure) => Failure { message: format!("{place}: {}", failure.message), ..failure },
            problem => Failure {
                code: UNAVAILABLE,
                message: format!(
                    "{place}: {} cannot be used ({}). What was received is kept; the next try goes on from there",
                    self.endpoint,
                    problem.message()
                ),
            },
        }
    }

    /// A refusal of the hub in the user's terms.
    fn refusal(&self, request: &Request, file: &str, answer: hub_transfer::Answer) -> Failure {
        let name = request.name();
        let page =
            format!("{}/{}{}", self.endpoint, if request.kind == "dataset" { "datasets/" } else { "" }, request.repo);
        let put_token =
            format!("put its token into HF_TOKEN or run `hf auth login` (it writes {})", self.token_path.display());
        let (code, message) = match (answer.status, answer.code.as_str()) {
            (_, "GatedRepo") | (403, _) => (
                PERMISSION_DENIED,
                match self.token {
                    None => format!(
                        "{name} is gated: accept its licence on {page} with an account of the hub, then {put_token}"
                    ),
                    Some(_) => format!(
                        "{name} is gated, and the account of the given token has no access yet: accept its licence on \
                         {page} with that account (a token with fine-grained rights needs 'read access to public \
                         gated repos'), or {put_token}"
                    ),
                },
            ),
            (401, code) if code != "RepoNotFound" && self.token.is_some() => (
                PERMISSION_DENIED,
                format!("{name}: {} does not accept the given token; make a new one, then {put_token}", self.endpoint),
            ),
            (_, "RevisionNotFound") => (
                NOT_FOUND,
                format!("{name} has no revision '{}': see {page}/tree/main", request.revision),
            ),
            (404, _) if !file.is_empty() => {
                (NOT_FOUND, format!("{name} has no file {file} in revision {}", request.revision))
            }
            (401 | 404, _) => (
                NOT_FOUND,
                format!(
                    "there is no {name} on {}: the name may be misspelt, or it is private and {}",
                    self.endpoint,
                    if self.token.is_some() { "the given token's account may not see it" } else { "a token is needed" },
                ) + &format!(" ({put_token})"),
            ),
            (status, _) => (UNAVAILABLE, format!("{name}: {} answered {status} {}", answer.url, answer.text)),
        };
        Failure { code, message }
    }
}

fn make_agent() -> Result<Agent, Failure> {
    let seconds = variable("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|text| text.parse().ok()).unwrap_or(30);
    let timeout = Some(Duration::from_secs(seconds));
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0) // hub_transfer follows them: the token stays with the endpoint
        .max_redirects_will_error(false)
        .user_agent(concat!("simpo-worker/", env!("CARGO_PKG_VERSION"), "; hf-hub"))
        .timeout_connect(timeout)
        .timeout_recv_response(timeout)
        .timeout_per_read(timeout);
    let bundle = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"].into_iter().find_map(path_variable);
    if let Some(path) = bundle {
        let pem = fs::read(&path).map_err(|e| Failure {
            code: NOT_FOUND,
            message: format!("cannot read the certificates of {}: {e}", path.display()),
        })?;
        let certificates: Vec<_> = parse_pem(&pem)
            .filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            })
            .collect();
        config = config.tls_config(TlsConfig::builder().root_certs(RootCerts::from(certificates)).build());
    }
    Ok(config.build().into())
}

/// Names below `folder` whose files are there (a link of the cache may have lost its blob).
fn walk(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    let entries: BTreeMap<_, _> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|item| (item.file_name(), item.path())).collect();
    for (name, path) in entries {
        let Some(name) = name.to_str() else { continue };
        if path.is_dir() {
            walk(&path, &format!("{prefix}{name}/"), files);
        } else if path.is_file() {
            files.push(format!("{prefix}{name}"));
        }
    }
}

/// snapshots/<commit>/<name> -> ../../blobs/<etag>, one ".." more for each folder in the name.
fn link(blob: &Path, snapshot: &Path, name: &str) -> std::io::Result<()> {
    let pointer = snapshot.join(name);
    let mut target = PathBuf::from("../..");
    target.extend(std::iter::repeat_n("..", name.matches('/').count()));
    target.push("blobs");
    target.push(blob.file_name().unwrap_or_default());
    let folder = pointer.parent().unwrap_or(snapshot);
    fs::create_dir_all(folder)?;
    let temporary = folder.join(format!(".{}.link", std::process::id()));
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(target, &temporary)?;
    fs::rename(&temporary, &pointer)
}

/// Writes a small file in one step: another process may be reading it.
fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    fs::create_dir_all(path.parent().unwrap_or(path))
        .and_then(|_| fs::write(&temporary, text))
        .and_then(|_| fs::rename(&temporary, path))
        .map_err(|e| hub_transfer::disk_failure(path, &e))
}

fn escape(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~/".contains(&b);
    name.bytes().map(|b| if plain(b) { (b as char).to_string() } else { format!("%{b:02X}") }).collect()
}

/// Answers a request about the hub with JSON (0) or with a message and the number of its status code.
unsafe fn hub_call(
    request: *const u8,
    size: usize,
    reply: *mut SimpoBytes,
    body: fn(&Hub, &Request) -> Result<serde_json::Value, Failure>,
) -> i32 {
    let answer = guarded(reply, || {
        let request = text(request, size)?;
        Ok(Request::parse(request).and_then(|request| body(&Hub::from_env()?, &request)))
    });
    let (code, text) = match answer {
        None => return INTERNAL, // guarded has written the message
        Some(Ok(json)) => (0, json.to_string()),
        Some(Err(failure)) => (failure.code, failure.message),
    };
    *reply = text.into_bytes().into();
    code
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_hub_list(request: *const u8, size: usize, reply: *mut SimpoBytes) -> i32 {
    hub_call(request, size, reply, Hub::list)
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_hub_fetch(request: *const u8, size: usize, reply: *mut SimpoBytes) -> i32 {
    hub_call(request, size, reply, Hub::fetch)
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_hub_conversion(request: *const u8, size: usize, reply: *mut SimpoBytes) -> i32 {
    hub_call(request, size, reply, Hub::conversion)
}
