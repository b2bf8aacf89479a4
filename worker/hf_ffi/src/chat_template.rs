//! Chat templates as transformers renders them: trim_blocks and lstrip_blocks, Python's string and
//! dict methods, raise_exception, strftime_now, and tojson without HTML escapes. A template comes from
//! a stranger's model, so its instructions and its output are bounded (the memory of one value in it is not).

use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;

/// Instructions a render may execute; a long conversation takes some ten thousand.
const FUEL: u64 = 50_000_000;
const MAX_OUTPUT_BYTES: usize = 256 << 20;
const NAME: &str = "chat_template";

pub struct ChatTemplate {
    environment: Environment<'static>,
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: String) -> String {
    chrono::Local::now().format(&format).to_string()
}

/// Python's json.dumps(value, ensure_ascii=False): a blank after each comma and colon.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

fn tojson(value: Value) -> Result<Value, Error> {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonFormatter);
    value
        .serialize(&mut serializer)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    match error.line() {
        Some(line) => format!("line {line} of the chat template: {what}"),
        None => format!("chat template: {what}"),
    }
}

impl ChatTemplate {
    pub fn new(source: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.set_fuel(Some(FUEL));
        environment.add_template_owned(NAME, source.to_string()).map_err(|e| describe(&e))?;
        Ok(Self { environment })
    }

    /// `context`: a JSON object.
    pub fn render(&self, context: &str) -> Result<String, String> {
        let context: serde_json::Value = serde_json::from_str(context).map_err(|e| e.to_string())?;
        let template = self.environment.get_template(NAME).map_err(|e| describe(&e))?;
        let mut output = Bounded(Vec::new());
        template.render_captured_to(Value::from_serialize(&context), &mut output).map_err(|e| describe(&e))?;
        String::from_utf8(output.0).map_err(|e| e.to_string())
    }
}

/// A writer that refuses to grow past MAX_OUTPUT_BYTES.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other("the rendered text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
