-- The vocabulary entries of some tokens, for a list of token ids.
--
-- Grain:   one row per different token of the list that is in the corpus, padding too.
-- Reads:   stg_vocab_blocks, stg_vocab, block_vocab_id
-- Units:   byte_digits are the entry's raw bytes as hexadecimal digits, two a byte.
-- Ask it:  from token_pieces([0, 4711])
create or replace macro token_pieces(ids) as table
with wanted as materialized (
    select distinct token_id, token_id // 512 as block_id from (select unnest(ids)::bigint as token_id)
),
found as materialized (
    select token_id, block_vocab_id(vocab_ids, token_id - first_token_id) as vocab_id
    from wanted
    join stg_vocab_blocks using (block_id)
    where token_id between first_token_id and first_token_id + n_tokens - 1
)
select token_id, vocab_id, stg_vocab.piece, stg_vocab.byte_digits
from found
join stg_vocab using (vocab_id);
