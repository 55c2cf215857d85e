-- The vocabulary entries of some tokens, for a list of token ids.
--
-- Grain:   one row per different token of the list that is in the corpus, padding too.
-- Reads:   stg_vocab, vocab_id_of
-- Units:   byte_digits are the entry's raw bytes as hexadecimal digits, two a byte.
-- Ask it:  from token_pieces([0, 4711])
create or replace macro token_pieces(ids) as table
with wanted as materialized (
    select distinct token_id from (select unnest(ids)::bigint as token_id)
),
found as materialized (
    select token_id, vocab_id_of(token_id) as vocab_id from wanted
)
select token_id, vocab_id, stg_vocab.piece, stg_vocab.byte_digits
from found
join stg_vocab using (vocab_id);
