//! Rows of a Parquet file as lines of JSON: flat columns of text and numbers, and lists of {role, content}.
//! A file comes from a stranger, so the sizes that it claims are checked before memory is taken for them.

use std::fs::File;
use std::io::Write;

use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::{get_column_reader, ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::errors::{ParquetError, Result};
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::schema::types::{ColumnDescPtr, Type};

/// Rows that are decoded at once.
const BATCH_ROWS: usize = 32;
const MAX_BATCH_BYTES: usize = 256 << 20;
/// Values of one column of one row group; writers make groups of far fewer.
const MAX_GROUP_VALUES: u64 = 16 << 20;
const MAX_PAGE_BYTES: usize = 1 << 30;

pub struct ParquetRows {
    file: SerializedFileReader<File>,
    wanted: Vec<String>,
    next_group: usize,
    columns: Vec<Column>,
}

/// One top-level column of the current row group.
struct Column {
    name: String,
    content: Content,
}

enum Content {
    Flat(Leaf),
    /// The fields `role` and `content` of a list of structs.
    Messages { role: Leaf, content: Leaf },
    /// Not needed: only its name is told.
    Unread,
    /// Of a type that no row has.
    Unsupported,
}

struct Leaf {
    reader: ColumnReader,
    max_def: i16,
    /// The definition level from which on a list has an element.
    element_def: i16,
    def: Vec<i16>,
    rep: Vec<i16>,
    values: Values,
}

enum Values {
    Bytes(Vec<ByteArray>),
    /// As they stand in JSON.
    Written(Vec<String>),
}

/// A page reader that believes no claimed size.
struct CheckedPages {
    pages: Box<dyn PageReader>,
    values: u64,
}

fn error(text: impl Into<String>) -> ParquetError {
    ParquetError::General(text.into())
}

impl Iterator for CheckedPages {
    type Item = Result<Page>;
    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let Some(page) = self.pages.get_next_page()? else { return Ok(None) };
        let values = u64::from(page.num_values());
        if page.buffer().len() > MAX_PAGE_BYTES {
            return Err(error("a page is larger than 1 GiB"));
        }
        if page.is_dictionary_page() {
            if values > page.buffer().len() as u64 {
                return Err(error("a dictionary claims more values than it has bytes"));
            }
        } else {
            self.values += values;
            if self.values > MAX_GROUP_VALUES {
                return Err(error("a row group has more than 16 million values in a column; write smaller row groups"));
            }
        }
        Ok(Some(page))
    }
    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }
    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }
    fn at_record_boundary(&mut self) -> Result<bool> {
        self.pages.at_record_boundary()
    }
}

/// The definition level of the repeated node of the leaf at `path`; 0 when there is none.
fn element_definition(root: &Type, path: &[String]) -> i16 {
    let mut level = 0;
    let mut node = root;
    for part in path {
        if !node.is_group() {
            return 0;
        }
        let Some(next) = node.get_fields().iter().find(|field| field.name() == part) else { return 0 };
        node = next;
        if node.get_basic_info().has_repetition() && !matches!(node.get_basic_info().repetition(), parquet::basic::Repetition::REQUIRED) {
            level += 1;
        }
        if node.get_basic_info().has_repetition() && matches!(node.get_basic_info().repetition(), parquet::basic::Repetition::REPEATED) {
            return level;
        }
    }
    0
}

fn read_typed<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    rows: usize,
    def: &mut Vec<i16>,
    rep: &mut Vec<i16>,
    write: impl Fn(&T::T) -> String,
) -> Result<(usize, Values)> {
    let mut values = Vec::new();
    let (records, _, _) = reader.read_records(rows, Some(def), Some(rep), &mut values)?;
    Ok((records, Values::Written(values.iter().map(write).collect())))
}

/// JSON has no infinities and no NaN.
fn number(value: f64) -> String {
    if value.is_finite() { value.to_string() } else { "null".to_string() }
}

impl Leaf {
    fn new(group: &dyn RowGroupReader, root: &Type, index: usize, descr: ColumnDescPtr) -> Result<Self> {
        let pages = CheckedPages { pages: group.get_column_page_reader(index)?, values: 0 };
        Ok(Leaf {
            max_def: descr.max_def_level(),
            element_def: element_definition(root, descr.path().parts()),
            reader: get_column_reader(descr, Box::new(pages)),
            def: Vec::new(),
            rep: Vec::new(),
            values: Values::Written(Vec::new()),
        })
    }

    /// Reads up to `rows` whole rows; fewer at the end of the row group.
    fn read(&mut self, rows: usize) -> Result<usize> {
        self.def.clear();
        self.rep.clear();
        let (def, rep) = (&mut self.def, &mut self.rep);
        let (records, values) = match &mut self.reader {
            ColumnReader::ByteArrayColumnReader(reader) => {
                let mut values = Vec::new();
                let (records, _, _) = reader.read_records(rows, Some(def), Some(rep), &mut values)?;
                (records, Values::Bytes(values))
            }
            ColumnReader::BoolColumnReader(r) => read_typed(r, rows, def, rep, |v| v.to_string())?,
            ColumnReader::Int32ColumnReader(r) => read_typed(r, rows, def, rep, |v| v.to_string())?,
            ColumnReader::Int64ColumnReader(r) => read_typed(r, rows, def, rep, |v| v.to_string())?,
            ColumnReader::FloatColumnReader(r) => read_typed(r, rows, def, rep, |v| number(f64::from(*v)))?,
            ColumnReader::DoubleColumnReader(r) => read_typed(r, rows, def, rep, |v| number(*v))?,
            _ => return Err(error("unsupported physical type")),
        };
        self.values = values;
        Ok(records)
    }

    fn supported(&self) -> bool {
        !matches!(self.reader, ColumnReader::Int96ColumnReader(_) | ColumnReader::FixedLenByteArrayColumnReader(_))
    }

    fn is_value(&self, level: usize) -> Result<bool> {
        if self.max_def == 0 {
            return Ok(true);
        }
        Ok(*self.def.get(level).ok_or_else(|| error("a column ends early"))? == self.max_def)
    }

    /// The value of level `level`, `*value` counting those that are not null.
    fn write(&self, out: &mut Vec<u8>, level: usize, value: &mut usize) -> Result<()> {
        if !self.is_value(level)? {
            out.extend_from_slice(b"null");
            return Ok(());
        }
        let ended = || error("a column ends early");
        match &self.values {
            Values::Bytes(values) => {
                let bytes = values.get(*value).ok_or_else(ended)?;
                let text = std::str::from_utf8(bytes.data()).map_err(|_| error("the text is not UTF-8"))?;
                serde_json::to_writer(&mut *out, text).map_err(|e| error(e.to_string()))?;
            }
            Values::Written(values) => out.extend_from_slice(values.get(*value).ok_or_else(ended)?.as_bytes()),
        }
        *value += 1;
        if out.len() > MAX_BATCH_BYTES {
            return Err(error("32 rows take more than 256 MiB"));
        }
        Ok(())
    }
}

/// The values of a flat column, or the lists of messages of the rows, one JSON text each.
fn column_texts(content: &Content, rows: usize, mut each: impl FnMut(usize, &[u8])) -> Result<()> {
    let mut text = Vec::new();
    match content {
        Content::Flat(leaf) => {
            let mut value = 0;
            for row in 0..rows {
                text.clear();
                leaf.write(&mut text, row, &mut value)?;
                each(row, &text);
            }
        }
        Content::Messages { role, content } => {
            if role.rep != content.rep {
                return Err(error("the fields of a list have different lengths"));
            }
            let (mut level, mut roles, mut contents) = (0, 0, 0);
            for row in 0..rows {
                text.clear();
                text.push(b'[');
                let first = level;
                while level < role.rep.len() && (level == first || role.rep[level] != 0) {
                    // An empty list or a null in its place has one level without an element.
                    if role.def.get(level).copied().unwrap_or(0) >= role.element_def {
                        text.extend_from_slice(if level == first { b"{\"role\":" } else { b",{\"role\":" });
                        role.write(&mut text, level, &mut roles)?;
                        text.extend_from_slice(b",\"content\":");
                        content.write(&mut text, level, &mut contents)?;
                        text.push(b'}');
                    }
                    level += 1;
                }
                text.push(b']');
                each(row, &text);
            }
        }
        Content::Unread => (0..rows).for_each(|row| each(row, b"null")),
        Content::Unsupported => (0..rows).for_each(|row| each(row, b"{}")),
    }
    Ok(())
}

impl ParquetRows {
    /// `wanted`: the names of the columns to read.
    pub fn open(path: &str, wanted: Vec<String>) -> std::result::Result<Self, String> {
        let file = File::open(path).map_err(|e| e.to_string())?;
        let file = SerializedFileReader::new(file).map_err(|e| e.to_string())?;
        Ok(ParquetRows { file, wanted, next_group: 0, columns: Vec::new() })
    }

    pub fn num_rows(&self) -> i64 {
        self.file.metadata().file_metadata().num_rows()
    }

    fn open_group(&mut self) -> Result<()> {
        let group = self.file.get_row_group(self.next_group)?;
        self.next_group += 1;
        let schema = self.file.metadata().file_metadata().schema_descr_ptr();
        let root = schema.root_schema();
        self.columns.clear();
        for field in root.get_fields() {
            let name = field.name().to_string();
            if !self.wanted.contains(&name) {
                self.columns.push(Column { name, content: Content::Unread });
                continue;
            }
            let leaf = |last: Option<&str>| -> Result<Option<Leaf>> {
                for (index, descr) in schema.columns().iter().enumerate() {
                    let parts = descr.path().parts();
                    let levels = if last.is_some() { descr.max_rep_level() == 1 } else { descr.max_rep_level() == 0 && parts.len() == 1 };
                    if parts[0] == name && levels && last.is_none_or(|l| parts.len() > 1 && parts[parts.len() - 1] == l) {
                        let leaf = Leaf::new(group.as_ref(), root, index, descr.clone())?;
                        return Ok(leaf.supported().then_some(leaf));
                    }
                }
                Ok(None)
            };
            let content = match (leaf(None)?, leaf(Some("role"))?, leaf(Some("content"))?) {
                (Some(flat), _, _) => Content::Flat(flat),
                (None, Some(role), Some(content)) => Content::Messages { role, content },
                _ => Content::Unsupported,
            };
            self.columns.push(Column { name, content });
        }
        Ok(())
    }

    /// Reads the same rows of every column; 0 at the end of the row group.
    fn read_columns(&mut self) -> Result<usize> {
        let mut rows = None;
        for column in &mut self.columns {
            let counts = match &mut column.content {
                Content::Flat(leaf) => [leaf.read(BATCH_ROWS)?; 2],
                Content::Messages { role, content } => [role.read(BATCH_ROWS)?, content.read(BATCH_ROWS)?],
                _ => continue,
            };
            if counts[0] != counts[1] || rows.is_some_and(|rows| rows != counts[0]) {
                return Err(error("the columns of a row group have different lengths"));
            }
            rows = Some(counts[0]);
        }
        Ok(rows.unwrap_or(0))
    }

    /// The next rows as lines of JSON; empty at the end of the file.
    pub fn next_rows(&mut self) -> std::result::Result<Vec<u8>, String> {
        self.read_batch().map_err(|e| e.to_string())
    }

    fn read_batch(&mut self) -> Result<Vec<u8>> {
        let mut rows = 0;
        while rows == 0 {
            rows = self.read_columns()?;
            if rows > 0 {
                break;
            }
            if self.next_group == self.file.num_row_groups() {
                return Ok(Vec::new());
            }
            self.open_group()?;
            // Without a column to read only the number of rows is known; one row is enough to say what is wrong.
            if self.columns.iter().all(|c| matches!(c.content, Content::Unread | Content::Unsupported)) {
                self.next_group = self.file.num_row_groups();
                rows = 1;
            }
        }
        let mut lines = vec![b"{".to_vec(); rows];
        for column in &self.columns {
            let mut name = serde_json::to_vec(&column.name).map_err(|e| error(e.to_string()))?;
            name.push(b':');
            column_texts(&column.content, rows, |row, text| {
                if lines[row].len() > 1 {
                    lines[row].push(b',');
                }
                lines[row].extend_from_slice(&name);
                lines[row].extend_from_slice(text);
            })?;
        }
        let mut out = Vec::with_capacity(lines.iter().map(|line| line.len() + 2).sum());
        for line in &lines {
            out.write_all(line).and_then(|()| out.write_all(b"}\n")).map_err(|e| error(e.to_string()))?;
        }
        Ok(out)
    }
}
