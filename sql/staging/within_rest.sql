-- The tokens of a range that no stored count covers exactly: their values must be read.
--
-- Grain:   one row per encoded token of the documents of the range that are not in within_parts; none where stored
--          counts suffice.
-- Reads:   within_documents, stg_tokens, is_encoded
-- Units:   source is the document's. The arguments are those of within_documents.
-- Ask it:  from within_rest(null, '1813', null, null, null)
--
-- Where there is no document to read, the list has one that does not exist: DuckDB then opens no file of tokens. Of an
-- empty list it would read the first rows.
create or replace macro within_rest(sources, since, until, from_part, to_part) as table
with chosen as materialized (
    select document_id, chosen.source
    from within_documents(sources, since, until, from_part, to_part) as chosen
    where not is_counted
),
to_read as materialized (
    from chosen
    union all
    select -1, null where not exists (from chosen)
)
select tokens.token_id, to_read.source
from stg_tokens as tokens
join to_read using (document_id)
where tokens.mask and is_encoded(tokens.token_id, tokens.vocab_id);
