"""The plan: every input row in a seeded random order, identical pairs collapsed, cut into fetch units.

Stage `plan-read`, one unit per source file (unit id `00000`, `00001`, ... in source order):
    rows.parquet   sorted runs of PLANNED rows (below, with `order`), a bounded number of rows in memory
    source.json    {"path", "size_bytes", "sha256", "num_rows"}: the entry of `Manifest.sources`
    counts         rows (input rows), pairs (rows written)
Stage `plan-order`, one unit per range of the 64-bit order (unit id `00000`, ...):
    rows.parquet   PLANNED rows of the range in (order, uid) order; each row group is one fetch unit
    counts         rows (input rows), pairs (distinct pairs = rows in the file), units (row groups),
                   reason:<reason> (input rows that are dropped before any download)

PLANNED columns
    uid        string   32 hex digits, 128-bit hash of (url, caption)
    order      uint64   hash of (uid, seed); the whole dataset is in (order, uid) order, unit after unit
    url        string   as in the list, stripped; null when there is none
    caption    string   never null, "" when there is none
    num_rows   int64    input rows that this pair stands for, >= 1; sums to the number of input rows
    reason     string   why it will not be downloaded (`missing_url`, `invalid_url`, `unsupported_scheme`,
                        `unreadable_row`, `caption_too_short`, ...: see pipeline.reasons); null: to be fetched
    rule       string   the configuration key that decided (`curate.min_caption_chars`), null if none did
    score      double   what the rule measured
    threshold  double   what it was compared with
    detail     string   a few words for people, such as the language detected
    then the list's extra columns with their types; those that bear a name of ours are renamed `source_<name>`

The plan depends on the rows, the seed and the plan.* settings only: not on how rows are spread over files, their
order, or the number of workers. (Extra columns of identical pairs are those of the first row of the first source.)
"""
