//! HTTP of the hub: requests that are tried again, and downloads that go on where they were cut, are
//! checked against the hub's checksum, and may be wanted by several processes at once.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use ring::digest;
use ureq::http::{HeaderMap, Response};
use ureq::Body;

use crate::hub::{Failure, Hub, DATA_LOSS, RESOURCE_EXHAUSTED, UNAVAILABLE};

/// A hub's answer that is neither success nor worth another try.
pub struct Answer {
    pub status: u16,
    pub code: String, // the hub's X-Error-Code: GatedRepo, RepoNotFound, RevisionNotFound, EntryNotFound
    pub text: String,
    pub url: String,
}

pub enum Problem {
    /// May go away: a lost connection, a busy server. `after`: the server's own wish.
    Passing {
        message: String,
        after: Option<Duration>,
    },
    Status(Answer),
    Fatal(Failure),
}

impl Problem {
    fn passing(message: impl Into<String>) -> Problem {
        Problem::Passing { message: message.into(), after: None }
    }

    fn disk(path: &Path, error: &io::Error) -> Problem {
        Problem::Fatal(disk_failure(path, error))
    }

    pub fn message(&self) -> &str {
        match self {
            Problem::Passing { message, .. } => message,
            Problem::Status(answer) => &answer.text,
            Problem::Fatal(failure) => &failure.message,
        }
    }
}

/// What the hub says of a file before it is fetched.
pub struct RemoteFile {
    pub etag: String, // the blob's name in the cache: SHA-256 of a large file, git's SHA-1 of a small one
    pub size: u64,
}

pub const TRIES: u32 = 5; // in a row without a byte received
const LONGEST_WAIT: Duration = Duration::from_secs(300); // the hub's own limits begin anew after that

pub fn disk_failure(path: &Path, error: &io::Error) -> Failure {
    let full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    let remedy = if full {
        "free some space, or let HF_HOME name a folder on a larger disk"
    } else {
        "HF_HOME names another folder"
    };
    Failure {
        code: if full { RESOURCE_EXHAUSTED } else { UNAVAILABLE },
        message: format!("cannot write {}: {error}; {remedy}", path.display()),
    }
}

/// Before the first byte: whether the cache's disk can hold what is to come.
pub fn check_space(folder: &Path, bytes: u64) -> Result<(), Failure> {
    if bytes == 0 {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(|e| disk_failure(folder, &e))?;
    let Ok(path) = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes()) else { return Ok(()) };
    let mut space = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with a zero byte, and the struct is read only after success.
    let free = unsafe {
        if libc::statvfs(path.as_ptr(), space.as_mut_ptr()) != 0 {
            return Ok(());
        }
        let space = space.assume_init();
        space.f_bavail * space.f_frsize
    };
    // What an earlier try left is counted as free: it is part of what is to come.
    let partial = fs::read_dir(folder.join("blobs")).into_iter().flatten().flatten();
    let partial: u64 = partial
        .filter(|item| item.file_name().to_string_lossy().ends_with(".incomplete"))
        .filter_map(|item| Some(item.metadata().ok()?.len()))
        .sum();
    if free + partial >= bytes {
        return Ok(());
    }
    Err(Failure {
        code: RESOURCE_EXHAUSTED,
        message: format!(
            "{} to download, but {} has {} free: free some space, or let HF_HOME name a folder on a larger disk",
            show_bytes(bytes),
            folder.display(),
            show_bytes(free)
        ),
    })
}

fn show_bytes(bytes: u64) -> String {
    let (unit, name) = match bytes {
        1_000_000_000.. => (1e9, "GB"),
        1_000_000.. => (1e6, "MB"),
        _ => (1e3, "kB"),
    };
    format!("{:.1} {name}", bytes as f64 / unit)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
}

/// "https://host:port" of a URL.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |i| i + 3);
    url[start..].find(['/', '?', '#']).map_or(url, |i| &url[..start + i])
}

/// One request. Redirects are followed here because the token may go to the endpoint only, and because a
/// large file's checksum stands in the endpoint's redirect to its storage: `head` stops there.
fn send(hub: &Hub, url: &str, head: bool, from: u64) -> Result<Response<Body>, Problem> {
    let mut url = url.to_string();
    for _ in 0..10 {
        let mut request = if head { hub.agent.head(&url) } else { hub.agent.get(&url) };
        request = request.header("accept-encoding", "identity"); // sizes and ranges are the file's own
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let at_endpoint = origin(&url) == origin(&hub.endpoint);
        if let (Some(token), true) = (&hub.token, at_endpoint) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = request.call().map_err(|e| Problem::passing(format!("{}: {e}", origin(&url))))?;
        let location = header(response.headers(), "location");
        if !response.status().is_redirection() || location.is_empty() {
            return check_status(response, &url, at_endpoint);
        }
        let next = match location.as_bytes() {
            [b'/', b'/', ..] => format!("{}:{location}", url.split(':').next().unwrap_or("https")),
            [b'/', ..] => format!("{}{location}", origin(&url)),
            _ => location.to_string(),
        };
        if head && origin(&next) != origin(&url) {
            return Ok(response);
        }
        url = next;
    }
    Err(Problem::passing(format!("{}: too many redirects", origin(&url))))
}

fn check_status(response: Response<Body>, url: &str, at_endpoint: bool) -> Result<Response<Body>, Problem> {
    let status = response.status().as_u16();
    if response.status().is_success() || status == 416 {
        return Ok(response);
    }
    let message = format!("{} answered {}", origin(url), response.status());
    let busy = status == 408 || status == 429 || status >= 500;
    // A storage's refusal means that the address it was given has expired: the hub gives a new one.
    if busy || !at_endpoint {
        let after = header(response.headers(), "retry-after").parse().ok().map(Duration::from_secs);
        return Err(Problem::Passing { message, after });
    }
    Err(Problem::Status(Answer {
        status,
        code: header(response.headers(), "x-error-code").to_string(),
        text: header(response.headers(), "x-error-message").to_string(),
        url: origin(url).to_string(),
    }))
}

/// Calls `attempt` until it succeeds, fails for good, or has failed `most` times without any progress
/// (the number that it is given to count up).
fn with_retries<T>(
    what: &str,
    most: u32,
    mut attempt: impl FnMut(&mut u64) -> Result<T, Problem>,
) -> Result<T, Problem> {
    let mut tries = 0;
    loop {
        let mut progress = 0;
        let (message, after) = match attempt(&mut progress) {
            Err(Problem::Passing { message, after }) => (message, after),
            result => return result,
        };
        tries = if progress > 0 { 1 } else { tries + 1 };
        if tries >= most {
            return Err(Problem::passing(message));
        }
        let jitter = Duration::from_millis(u64::from(std::process::id()) % 100);
        let wait = after.unwrap_or(Duration::from_millis(500) * 2_u32.pow(tries - 1) + jitter).min(LONGEST_WAIT);
        eprintln!("{what}: {message}; trying again in {:.1} s", wait.as_secs_f64());
        std::thread::sleep(wait);
    }
}

pub fn get_text(hub: &Hub, url: &str, tries: u32) -> Result<String, Problem> {
    with_retries("hub", tries, |_| {
        let mut response = send(hub, url, false, 0)?;
        let body = response.body_mut().with_config().limit(256 << 20).read_to_string();
        body.map_err(|e| Problem::passing(format!("{}: {e}", origin(url))))
    })
}

pub fn ask_file(hub: &Hub, url: &str) -> Result<RemoteFile, Problem> {
    with_retries("hub", TRIES, |_| {
        let response = send(hub, url, true, 0)?;
        let headers = response.headers();
        let either = |linked: &str, own: &str| match header(headers, linked) {
            "" => header(headers, own).to_string(),
            value => value.to_string(),
        };
        let etag = either("x-linked-etag", "etag").trim_start_matches("W/").trim_matches('"').to_string();
        let size = either("x-linked-size", "content-length").parse();
        let named = !etag.is_empty() && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        match size {
            Ok(size) if named && !etag.starts_with('.') => Ok(RemoteFile { etag, size }),
            _ => Err(Problem::passing(format!("{} names no checksum and size; check HF_ENDPOINT", origin(url)))),
        }
    })
}

/// Brings one file to `blob`, under the lock that huggingface_hub takes too.
pub fn fetch_blob(
    hub: &Hub,
    name: &str,
    url: &str,
    file: &RemoteFile,
    blob: &Path,
    lock: &Path,
) -> Result<(), Problem> {
    let make = |path: &Path| fs::create_dir_all(path.parent().unwrap_or(path)).map_err(|e| Problem::disk(path, &e));
    make(lock)?;
    make(blob)?;
    let lock_file = OpenOptions::new().create(true).append(true).open(lock).map_err(|e| Problem::disk(lock, &e))?;
    if let Err(TryLockError::WouldBlock) = lock_file.try_lock() {
        eprintln!("{name}: another process is downloading it; waiting (lock {})", lock.display());
        lock_file.lock().map_err(|e| Problem::disk(lock, &e))?;
    }
    if blob.exists() {
        return Ok(());
    }
    let partial = blob.with_file_name(format!("{}.incomplete", file.etag));
    let mut progress = Progress::new(name, file.size);
    for last_try in [false, true] {
        with_retries(name, TRIES, |received| receive(hub, url, file, &partial, &mut progress, received))?;
        progress.finish();
        let found = checksum(&partial, file).map_err(|e| Problem::disk(&partial, &e))?;
        if found.as_ref().is_none_or(|found| *found == file.etag) {
            return fs::rename(&partial, blob).map_err(|e| Problem::disk(blob, &e));
        }
        fs::remove_file(&partial).map_err(|e| Problem::disk(&partial, &e))?;
        let message = format!(
            "wrong checksum: {} instead of {}; what was downloaded is deleted",
            found.unwrap_or_default(),
            file.etag
        );
        if last_try {
            return Err(Problem::Fatal(Failure {
                code: DATA_LOSS,
                message: format!(
                    "{message}. Twice is no accident: look at the file on {}, or at the proxy between",
                    hub.endpoint
                ),
            }));
        }
        eprintln!("{name}: {message}; downloading it again");
    }
    Ok(())
}

/// What is missing of `partial`, in one request.
fn receive(
    hub: &Hub,
    url: &str,
    file: &RemoteFile,
    partial: &Path,
    progress: &mut Progress,
    received: &mut u64,
) -> Result<(), Problem> {
    let on_disk = |e: io::Error| Problem::disk(partial, &e);
    let mut out = OpenOptions::new().create(true).truncate(false).write(true).open(partial).map_err(on_disk)?;
    let mut have = out.metadata().map_err(on_disk)?.len();
    if have > file.size {
        out.set_len(0).map_err(on_disk)?;
        have = 0;
    }
    if have < file.size {
        let response = send(hub, url, false, have)?;
        let headers = response.headers();
        let range = header(headers, "content-range");
        let total = match response.status().as_u16() {
            206 if range.starts_with(&format!("bytes {have}-")) => range.rsplit('/').next().unwrap_or("").parse(),
            200 => {
                if have > 0 {
                    out.set_len(0).map_err(on_disk)?;
                    have = 0;
                }
                header(headers, "content-length").parse()
            }
            status => {
                out.set_len(0).map_err(on_disk)?;
                return Err(Problem::passing(format!("answer {status} with range '{range}' to bytes={have}-")));
            }
        };
        if total.as_ref().is_ok_and(|total: &u64| *total != file.size) {
            out.set_len(0).map_err(on_disk)?;
            return Err(Problem::passing(format!("{} bytes are offered instead of {}", total.unwrap_or(0), file.size)));
        }
        out.seek(SeekFrom::Start(have)).map_err(on_disk)?;
        progress.start_at(have);
        copy(response, &mut out, file.size - have, progress, received).map_err(|problem| match problem {
            CopyError::Disk(e) => Problem::disk(partial, &e),
            CopyError::Connection(message) => Problem::passing(message),
        })?;
    }
    out.sync_data().map_err(on_disk)
}

enum CopyError {
    Disk(io::Error),
    Connection(String),
}

fn copy(
    response: Response<Body>,
    out: &mut File,
    size: u64,
    progress: &mut Progress,
    received: &mut u64,
) -> Result<(), CopyError> {
    let mut body = response.into_body().into_reader();
    let mut buffer = vec![0; 1 << 18];
    while *received < size {
        let room = buffer.len().min((size - *received) as usize);
        let count = match body.read(&mut buffer[..room]) {
            Ok(0) => {
                return Err(CopyError::Connection(format!("the connection ended {} bytes early", size - *received)))
            }
            Ok(count) => count,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(CopyError::Connection(format!("the connection was lost ({e})"))),
        };
        out.write_all(&buffer[..count]).map_err(CopyError::Disk)?;
        *received += count as u64;
        progress.add(count as u64);
    }
    Ok(())
}

/// The file's name by its content; None where the etag is of a kind that says nothing of it.
fn checksum(path: &Path, file: &RemoteFile) -> io::Result<Option<String>> {
    let mut context = match file.etag.len() {
        64 => digest::Context::new(&digest::SHA256),
        40 => digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY),
        _ => return Ok(None),
    };
    if file.etag.len() == 40 {
        context.update(format!("blob {}\0", file.size).as_bytes()); // as git names a blob
    }
    let mut input = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match input.read(&mut buffer)? {
            0 => break,
            count => context.update(&buffer[..count]),
        }
    }
    Ok(Some(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()))
}

/// Lines on stderr: one that is written over on a terminal, else one every ten seconds and one at the end.
struct Progress<'a> {
    name: &'a str,
    size: u64,
    done: u64,
    received: u64,
    started: Instant,
    shown: Instant,
    terminal: bool,
}

impl<'a> Progress<'a> {
    fn new(name: &'a str, size: u64) -> Progress<'a> {
        let now = Instant::now();
        Progress { name, size, done: 0, received: 0, started: now, shown: now, terminal: io::stderr().is_terminal() }
    }

    fn start_at(&mut self, have: u64) {
        if have > 0 && self.received == 0 {
            eprintln!("{}: going on after {} of {}", self.name, show_bytes(have), show_bytes(self.size));
        }
        self.done = have;
    }

    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        self.received += bytes;
        let every = Duration::from_millis(if self.terminal { 500 } else { 10_000 });
        if self.shown.elapsed() >= every {
            self.shown = Instant::now();
            self.show(if self.terminal { "\r" } else { "" }, if self.terminal { "" } else { "\n" });
        }
    }

    fn finish(&mut self) {
        self.show(if self.terminal { "\r" } else { "" }, "\n");
    }

    fn show(&self, before: &str, after: &str) {
        let rate = self.received as f64 / self.started.elapsed().as_secs_f64().max(1e-3);
        eprint!(
            "{before}downloaded {}: {} of {}, {}/s{after}",
            self.name,
            show_bytes(self.done),
            show_bytes(self.size),
            show_bytes(rate as u64)
        );
    }
}
