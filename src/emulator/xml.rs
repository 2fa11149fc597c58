//! Writes the few XML documents the service answers with.

use std::fmt::Write as _;

use quick_xml::escape::escape;

/// A document under construction.
#[derive(Debug)]
pub(super) struct Xml(String);

impl Xml {
    pub(super) fn new() -> Self {
        Self("<?xml version=\"1.0\" encoding=\"utf-8\"?>".to_owned())
    }

    pub(super) fn open(&mut self, element: &str) {
        self.0.push('<');
        self.0.push_str(element);
        self.0.push('>');
    }

    /// Opens an element with attributes.
    pub(super) fn open_with(&mut self, element: &str, attributes: &[(&str, &str)]) {
        self.0.push('<');
        self.0.push_str(element);
        for (name, value) in attributes {
            self.0.push_str(&format!(" {name}=\"{}\"", escape(*value)));
        }
        self.0.push('>');
    }

    pub(super) fn close(&mut self, element: &str) {
        self.0.push_str("</");
        self.0.push_str(element);
        self.0.push('>');
    }

    /// An element that holds text.
    pub(super) fn text(&mut self, element: &str, text: &str) {
        self.open(element);
        self.0.push_str(&escape(text));
        self.close(element);
    }

    /// An element that holds text, when there is any.
    pub(super) fn optional(&mut self, element: &str, text: Option<&str>) {
        if let Some(text) = text {
            self.text(element, text);
        }
    }

    /// `<ELEMENT><Start>..</Start><End>..</End></ELEMENT>`, both ends inclusive.
    pub(super) fn range(&mut self, element: &str, first: u64, last: u64) {
        self.open(element);
        // Writing to a String cannot fail.
        let written = write!(self.0, "<Start>{first}</Start><End>{last}</End>");
        debug_assert!(written.is_ok());
        self.close(element);
    }

    pub(super) fn finish(self) -> String {
        self.0
    }
}
