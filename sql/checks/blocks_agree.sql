-- The blocks of vocabulary ids hold the same ids as the tokens table.
--
-- Grain:   one row per token that differs, or is missing in one of the two. A block of the wrong length gives its first
--          token.
-- Reads:   src_tokens, stg_vocab_blocks, block_vocab_id
-- Units:   vocab_id comes from the tokens table, in_block from the block (null if missing).
-- Ask it:  do contexts show what the model was fed?
with told as (
    select
        block_id,
        first_token_id + place                 as token_id,
        case when place < octet_length(vocab_ids) // 4 then block_vocab_id(vocab_ids, place) end as in_block,
        octet_length(vocab_ids) = 4 * n_tokens as has_length
    from (
        select *, unnest(generate_series(0, greatest(octet_length(vocab_ids) // 4, n_tokens) - 1)) as place
        from stg_vocab_blocks
        where n_tokens between 0 and 512
    )
)
select
    coalesce(src_tokens.token_id, told.token_id) as token_id,
    src_tokens.vocab_id,
    told.in_block
from src_tokens
full join told on told.token_id = src_tokens.token_id
where src_tokens.vocab_id is distinct from told.in_block
    or told.block_id <> told.token_id // 512
    or not told.has_length
order by 1;
