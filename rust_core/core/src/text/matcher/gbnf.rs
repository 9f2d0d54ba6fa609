//! GBNF, llama.cpp's grammar language, to Lark.
//!
//! A rule that leads to no recursion is a terminal: its text is matched as one regular expression,
//! exactly. The others stay rules. A rule ends where the next one begins, so that line breaks are free.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use super::gbnf_tokens::{Token, is_name, tokens};
use super::lark;
use crate::error::{Error, Result};

/// Deepest nesting of groups, and of rules within rules.
const MAX_DEPTH: usize = 64;

/// True if some line defines a rule by `::=`.
pub(super) fn is_gbnf(text: &str) -> bool {
    text.lines().any(|line| {
        let name = line.split("::=").next().unwrap_or_default();
        name.len() < line.len() && !name.trim().is_empty() && name.trim().chars().all(is_name)
    })
}

/// The same grammar in Lark.
///
/// # Errors
/// [`Error::InvalidArgument`] naming the line at fault, or the rule that is missing.
pub(super) fn to_lark(text: &str) -> Result<String> {
    let tokens = tokens(text)?;
    let rules = Parser { tokens, at: 0 }.rules()?;
    Writer::new(&rules)?.write()
}

// ----------------------------------------------------------------------------------------- rules

enum Node {
    Text(String),
    Class(String),
    Special(String),
    Rule(String),
    Sequence(Vec<Node>),
    Either(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

struct Parser {
    tokens: Vec<(usize, Token)>,
    at: usize,
}

impl Parser {
    fn peek(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead).map(|(_, token)| token)
    }

    fn error(&self, why: &str) -> Error {
        let line = self.tokens.get(self.at).or(self.tokens.last());
        Error::invalid(format!("line {}: {why}", line.map_or(1, |(line, _)| *line)))
    }

    fn rules(mut self) -> Result<BTreeMap<String, Node>> {
        let mut rules = BTreeMap::new();
        while let Some(token) = self.peek(0) {
            let Token::Name(name) = token.clone() else {
                return Err(self.error("a rule begins with its name"));
            };
            if self.peek(1) != Some(&Token::Defines) {
                return Err(self.error(&format!("{name}: ::= is missing")));
            }
            self.at += 2;
            let node = self.either(0)?;
            if rules.insert(name.clone(), node).is_some() {
                return Err(self.error(&format!("{name} is defined twice")));
            }
        }
        Ok(rules)
    }

    fn either(&mut self, depth: usize) -> Result<Node> {
        if depth > MAX_DEPTH {
            return Err(self.error("groups are nested too deeply"));
        }
        let mut options = vec![self.sequence(depth)?];
        while self.peek(0) == Some(&Token::Mark('|')) {
            self.at += 1;
            options.push(self.sequence(depth)?);
        }
        Ok(match options.pop() {
            Some(only) if options.is_empty() => only,
            last => Node::Either(options.into_iter().chain(last).collect()),
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<Node> {
        let mut nodes = Vec::new();
        loop {
            let node = match self.peek(0) {
                // The next rule's.
                Some(Token::Name(_)) if self.peek(1) == Some(&Token::Defines) => break,
                Some(Token::Name(name)) => Node::Rule(name.clone()),
                Some(Token::Text(text)) => Node::Text(text.clone()),
                Some(Token::Class(class)) => Node::Class(class.clone()),
                Some(Token::Special(name)) => Node::Special(name.clone()),
                Some(Token::Mark('.')) => Node::Class("(?s:.)".into()),
                Some(Token::Mark('(')) => {
                    self.at += 1;
                    let node = self.either(depth + 1)?;
                    if self.peek(0) != Some(&Token::Mark(')')) {
                        return Err(self.error("a group has no end"));
                    }
                    node
                }
                Some(Token::Mark('|' | ')')) | None => break,
                Some(_) => return Err(self.error("there is nothing to repeat")),
            };
            self.at += 1;
            nodes.push(self.repeated(node));
        }
        Ok(match nodes.pop() {
            Some(only) if nodes.is_empty() => only,
            last => Node::Sequence(nodes.into_iter().chain(last).collect()),
        })
    }

    fn repeated(&mut self, mut node: Node) -> Node {
        while let Some(token) = self.peek(0) {
            let (least, most) = match token {
                Token::Mark('*') => (0, None),
                Token::Mark('+') => (1, None),
                Token::Mark('?') => (0, Some(1)),
                Token::Repeat(least, most) => (*least, *most),
                _ => break,
            };
            self.at += 1;
            node = Node::Repeat(Box::new(node), least, most);
        }
        node
    }
}

// ------------------------------------------------------------------------------------------ Lark

struct Writer<'a> {
    rules: &'a BTreeMap<String, Node>,
    /// Lark's names: capitals for terminals.
    names: HashMap<&'a str, String>,
}

/// The standing of a rule: one that leads to no recursion can be a terminal.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Visiting,
    Terminal,
    Rule,
}

impl<'a> Writer<'a> {
    fn new(rules: &'a BTreeMap<String, Node>) -> Result<Self> {
        if !rules.contains_key("root") {
            return Err(Error::invalid("the rule root is missing"));
        }
        let mut kinds = HashMap::new();
        for name in rules.keys() {
            find_kind(rules, name, &mut kinds, 0)?;
        }
        let names = rules.keys().enumerate().map(|(number, name)| {
            let is_terminal = kinds.get(name.as_str()) == Some(&Kind::Terminal);
            let lark = if is_terminal { "T_" } else { "r_" };
            (name.as_str(), format!("{lark}{number}"))
        });
        Ok(Self {
            rules,
            names: names.collect(),
        })
    }

    fn write(&self) -> Result<String> {
        let mut text = format!("start: {}\n", self.name("root")?);
        for (name, node) in self.rules {
            let _ = writeln!(text, "{}: {}", self.name(name)?, self.node(node)?);
        }
        Ok(text)
    }

    fn name(&self, name: &str) -> Result<&str> {
        let found = self.names.get(name).map(String::as_str);
        found.ok_or_else(|| Error::invalid(format!("the rule {name} is missing")))
    }

    fn node(&self, node: &Node) -> Result<String> {
        let all = |nodes: &[Node], between: &str| -> Result<String> {
            let parts: Result<Vec<String>> = nodes.iter().map(|node| self.node(node)).collect();
            Ok(format!("({})", parts?.join(between)))
        };
        Ok(match node {
            Node::Text(text) => lark::string(text),
            Node::Class(class) => format!("/{class}/"),
            Node::Special(name) => name.clone(),
            Node::Rule(name) => self.name(name)?.to_owned(),
            Node::Sequence(nodes) if nodes.is_empty() => "\"\"".into(),
            Node::Sequence(nodes) => all(nodes, " ")?,
            Node::Either(nodes) => all(nodes, " | ")?,
            Node::Repeat(node, least, most) => {
                let node = self.node(node)?;
                match (least, most) {
                    (0, None) => format!("({node})*"),
                    (1, None) => format!("({node})+"),
                    (0, Some(1)) => format!("({node})?"),
                    (_, Some(0)) => "\"\"".into(),
                    (least, None) => format!("({node}){{{least},}}"),
                    (least, Some(most)) => format!("({node}){{{least},{most}}}"),
                }
            }
        })
    }
}

fn find_kind<'a>(
    rules: &'a BTreeMap<String, Node>,
    name: &'a str,
    kinds: &mut HashMap<&'a str, Kind>,
    depth: usize,
) -> Result<Kind> {
    match kinds.get(name) {
        // Back where it came from: a recursion.
        Some(Kind::Visiting) => return Ok(Kind::Rule),
        Some(&kind) => return Ok(kind),
        None => {}
    }
    if depth > MAX_DEPTH {
        return Err(Error::invalid("rules are nested too deeply"));
    }
    let Some(node) = rules.get(name) else {
        return Err(Error::invalid(format!("the rule {name} is missing")));
    };
    kinds.insert(name, Kind::Visiting);
    let mut kind = Kind::Terminal;
    let mut open = vec![node];
    while let Some(node) = open.pop() {
        match node {
            Node::Text(_) | Node::Class(_) => {}
            Node::Special(_) => kind = Kind::Rule,
            Node::Rule(name) => {
                if find_kind(rules, name, kinds, depth + 1)? != Kind::Terminal {
                    kind = Kind::Rule;
                }
            }
            Node::Sequence(nodes) | Node::Either(nodes) => open.extend(nodes),
            Node::Repeat(node, ..) => open.push(node),
        }
    }
    kinds.insert(name, kind);
    Ok(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_recur_stay_rules_and_others_are_terminals() {
        let text = "root ::= value # a comment\nvalue ::= \"[\" ws (value (\",\" value)*)? \"]\" |\n  number\nnumber ::= [0-9]+\nws ::= [ \\t\\n]*";
        let lark = to_lark(text).unwrap();
        let lines: Vec<&str> = lark.lines().collect();
        assert_eq!(lines[0], "start: r_1");
        assert_eq!(lines[1], "T_0: (/[\\x{30}-\\x{39}]/)+");
        assert_eq!(lines[2], "r_1: r_2");
        assert_eq!(
            lines[3],
            "r_2: ((\"[\" T_3 ((r_2 ((\",\" r_2))*))? \"]\") | T_0)"
        );
        assert_eq!(lines[4], "T_3: (/[\\x{20}\\x{9}\\x{a}]/)*");
    }

    #[test]
    fn repetitions_and_escapes() {
        let lark =
            to_lark(r#"root ::= "a\x41\n"{2,3} [^\]\-a-c]{4} .{1,} <|end|> !<[7]>"#).unwrap();
        assert!(lark.contains(r#"("aA\u000a"){2,3}"#), "{lark}");
        assert!(
            lark.contains(r"(/[^\x{5d}\x{2d}\x{61}-\x{63}]/){4,4}"),
            "{lark}"
        );
        assert!(lark.contains("(/(?s:.)/)+ <|end|> <[^7]>"), "{lark}");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, why) in [
            ("root ::= \"a", "line 1: a text has no end"),
            ("root ::= \"a\"\nx ::= [", "line 2: a class has no end"),
            ("root ::= missing", "the rule missing is missing"),
            ("a ::= \"b\"", "the rule root is missing"),
            ("root ::= (\"a\"", "line 1: a group has no end"),
            ("root ::= *", "line 1: there is nothing to repeat"),
            (
                "root ::= \"a\"{3,2}",
                "line 1: a repetition ends before it begins",
            ),
            (
                "root ::= \"a\"{99999}",
                "line 1: more than 10000 repetitions",
            ),
            (
                "root ::= \"a\"\nroot ::= \"b\"",
                "line 2: root is defined twice",
            ),
        ] {
            assert_eq!(to_lark(text).unwrap_err().to_string(), why, "{text}");
        }
    }

    #[test]
    fn gbnf_is_known_by_its_definitions() {
        assert!(is_gbnf("root ::= \"a\""));
        assert!(is_gbnf("# grammar\n  my-rule ::= \"a\""));
        assert!(!is_gbnf("start: \"::=\""));
    }
}
