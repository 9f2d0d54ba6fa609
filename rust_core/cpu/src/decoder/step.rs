//! Step: the tokens of one call of the decoder.

/// One step's tokens; see [`AttentionArgs`](crate::attention::AttentionArgs) and [`RopeArgs`](crate::rope::RopeArgs).
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// [T]
    pub positions: &'a [i32],
    /// [T]
    pub slot_mapping: &'a [i32],
    /// [table_rows, max_blocks]
    pub block_table: &'a [i32],
    /// Columns of block_table.
    pub max_blocks: usize,
    /// [R]
    pub slots: &'a [i32],
    /// [R]
    pub seq_lens: &'a [i32],
    /// [R + 1]
    pub query_start_loc: &'a [i32],
    /// Only the last row of each request is computed to the end.
    pub ends_only: bool,
}

/// The last row of every request that has rows.
///
/// # Errors
/// When requests do not follow each other, or have more rows than tokens.
pub(super) fn ends(step: &Step, tokens: usize) -> Result<Vec<usize>, String> {
    let mut ends = Vec::with_capacity(step.slots.len());
    for (r, pair) in step.query_start_loc.windows(2).enumerate() {
        let (start, end, seq_len) = (pair[0], pair[1], step.seq_lens[r]);
        if start < 0 || end < start || end as usize > tokens || end - start > seq_len {
            return Err(format!(
                "request {r}: query rows {start}..{end} of {tokens} with seq_len {seq_len}"
            ));
        }
        if end > start {
            ends.push(end as usize - 1);
        }
    }
    if ends.is_sorted_by(|a, b| a < b) {
        Ok(ends)
    } else {
        Err("query_start_loc does not ascend".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_last_rows_of_requests_that_have_some() {
        let find = |starts: &[i32], seq_lens: &[i32], tokens| {
            let step = Step {
                positions: &[],
                slot_mapping: &[],
                block_table: &[],
                max_blocks: 0,
                slots: seq_lens,
                seq_lens,
                query_start_loc: starts,
                ends_only: true,
            };
            ends(&step, tokens)
        };
        assert_eq!(find(&[0, 3, 3, 4], &[3, 0, 9], 4), Ok(vec![2, 3]));
        assert_eq!(find(&[0], &[], 0), Ok(vec![]));
        for (starts, seq_lens) in [
            (&[0, 5][..], &[5][..]),
            (&[0, 3], &[2]),
            (&[-1, 2], &[4]),
            (&[0, 2, 1], &[2, 2]),
        ] {
            assert!(find(starts, seq_lens, 4).is_err());
        }
    }
}
