//! Hugging Face's tokenizers, a Jinja engine, a Parquet reader and the Hugging Face hub behind the C interface of hf_ffi.h.
//!
//! Every function catches panics and turns them into errors; pointers that C++ passes are valid for
//! the call, as the header says.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::slice;

mod chat_template;
mod hub;
mod hub_transfer;
mod parquet;

use chat_template::ChatTemplate;
use parquet::ParquetRows;
use tokenizers::Tokenizer;

#[repr(C)]
pub struct SimpoBytes {
    data: *mut u8,
    size: usize,
    capacity: usize,
}

impl From<Vec<u8>> for SimpoBytes {
    fn from(mut bytes: Vec<u8>) -> Self {
        let out = SimpoBytes { data: bytes.as_mut_ptr(), size: bytes.len(), capacity: bytes.capacity() };
        std::mem::forget(bytes);
        out
    }
}

#[repr(C)]
pub struct SimpoIds {
    data: *mut u32,
    size: usize,
    capacity: usize,
}

/// Runs `body`; an error or a panic is written to `error` and gives None.
unsafe fn guarded<T>(error: *mut SimpoBytes, body: impl FnOnce() -> Result<T, String>) -> Option<T> {
    // A panic is told once, by whoever gets the error.
    static QUIET: std::sync::Once = std::sync::Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let message = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => return Some(value),
        Ok(Err(message)) => message,
        Err(panic) => match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
            (Some(text), _) => format!("internal error: {text}"),
            (_, Some(text)) => format!("internal error: {text}"),
            _ => "internal error".to_string(),
        },
    };
    *error = message.into_bytes().into();
    None
}

unsafe fn text<'a>(data: *const u8, size: usize) -> Result<&'a str, String> {
    let bytes = if size == 0 { &[] } else { slice::from_raw_parts(data, size) };
    std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8: {e}"))
}

/// # Safety
/// `bytes` came from this library and is not used again.
#[no_mangle]
pub unsafe extern "C" fn simpo_bytes_free(bytes: SimpoBytes) {
    drop(Vec::from_raw_parts(bytes.data, bytes.size, bytes.capacity));
}

/// # Safety
/// `ids` came from this library and is not used again.
#[no_mangle]
pub unsafe extern "C" fn simpo_ids_free(ids: SimpoIds) {
    drop(Vec::from_raw_parts(ids.data, ids.size, ids.capacity));
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_tokenizer_new(json: *const u8, size: usize, error: *mut SimpoBytes) -> *mut Tokenizer {
    let made = guarded(error, || {
        let mut tokenizer = Tokenizer::from_bytes(text(json, size)?).map_err(|e| e.to_string())?;
        // A file may ask for truncation or padding of its own; the trainer's rules decide both.
        tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
        tokenizer.with_padding(None);
        Ok(tokenizer)
    });
    made.map_or(std::ptr::null_mut(), |tokenizer| Box::into_raw(Box::new(tokenizer)))
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_tokenizer_free(tokenizer: *mut Tokenizer) {
    if !tokenizer.is_null() {
        drop(Box::from_raw(tokenizer));
    }
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_tokenizer_encode(
    tokenizer: *const Tokenizer,
    data: *const u8,
    size: usize,
    ids: *mut SimpoIds,
    error: *mut SimpoBytes,
) -> bool {
    let encoded = guarded(error, || {
        let encoding = (*tokenizer).encode_fast(text(data, size)?, false).map_err(|e| e.to_string())?;
        Ok(encoding.get_ids().to_vec())
    });
    let Some(mut encoded) = encoded else { return false };
    *ids = SimpoIds { data: encoded.as_mut_ptr(), size: encoded.len(), capacity: encoded.capacity() };
    std::mem::forget(encoded);
    true
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_tokenizer_token_to_id(tokenizer: *const Tokenizer, token: *const u8, size: usize) -> i64 {
    match text(token, size) {
        Ok(token) => (*tokenizer).token_to_id(token).map_or(-1, i64::from),
        Err(_) => -1,
    }
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_tokenizer_vocab_size(tokenizer: *const Tokenizer) -> usize {
    (*tokenizer).get_vocab_size(true)
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_template_new(source: *const u8, size: usize, error: *mut SimpoBytes) -> *mut ChatTemplate {
    let made = guarded(error, || ChatTemplate::new(text(source, size)?));
    made.map_or(std::ptr::null_mut(), |template| Box::into_raw(Box::new(template)))
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_template_free(template: *mut ChatTemplate) {
    if !template.is_null() {
        drop(Box::from_raw(template));
    }
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_template_render(
    template: *const ChatTemplate,
    context: *const u8,
    size: usize,
    out: *mut SimpoBytes,
    error: *mut SimpoBytes,
) -> bool {
    match guarded(error, || (*template).render(text(context, size)?)) {
        Some(rendered) => {
            *out = rendered.into_bytes().into();
            true
        }
        None => false,
    }
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_parquet_open(
    path: *const u8,
    path_size: usize,
    columns: *const u8,
    columns_size: usize,
    error: *mut SimpoBytes,
) -> *mut ParquetRows {
    let made = guarded(error, || {
        let wanted = text(columns, columns_size)?.split('\n').map(str::to_string).collect();
        ParquetRows::open(text(path, path_size)?, wanted)
    });
    made.map_or(std::ptr::null_mut(), |rows| Box::into_raw(Box::new(rows)))
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_parquet_free(rows: *mut ParquetRows) {
    if !rows.is_null() {
        drop(Box::from_raw(rows));
    }
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_parquet_num_rows(rows: *const ParquetRows) -> i64 {
    (*rows).num_rows()
}

/// # Safety
/// See hf_ffi.h.
#[no_mangle]
pub unsafe extern "C" fn simpo_parquet_next(rows: *mut ParquetRows, out: *mut SimpoBytes, error: *mut SimpoBytes) -> bool {
    match guarded(error, || (*rows).next_rows()) {
        Some(lines) => {
            *out = lines.into();
            true
        }
        None => false,
    }
}
