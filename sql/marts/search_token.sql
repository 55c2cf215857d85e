-- Vocabulary entries that contain a text, and how often the corpus has them.
--
-- Grain:   one row per vocabulary entry whose piece contains the text, whatever the case, the shortest first.
-- Reads:   stg_vocab, stg_tokens
-- Units:   n_tokens counts real tokens of the corpus; first_token_id is the first of them (null if there is none).
-- Parameters: text text
-- Ask it:  which tokens spell love?  from search_token('love')
create or replace macro search_token(text) as table
with entries as materialized (
    select vocab_id, piece from stg_vocab where contains(lower(whole_piece), lower(text::varchar))
),
counts as (
    select vocab_id, count(*) as n_tokens, min(token_id) as first_token_id
    from stg_tokens
    where mask and vocab_id in (select vocab_id from entries)
    group by vocab_id
)
select
    vocab_id,
    entries.piece,
    coalesce(counts.n_tokens, 0) as n_tokens,
    counts.first_token_id
from entries
left join counts using (vocab_id)
order by length(entries.piece), n_tokens desc, vocab_id;
