-- The vocabulary ids of consecutive tokens, many in one row, so that a few can be found without reading a whole column.
--
-- Grain:   one row per block of at most 512 tokens. If a part ends inside a block, two rows have one block_id.
-- Reads:   src_vocab_blocks
-- Units:   block_id is token_id // 512; vocab_ids is a blob of 4-byte big-endian ids (block_vocab_id takes one out).
-- Ask it:  what is the vocabulary id of token 4711? (filter on block_id, then on first_token_id and n_tokens)
create or replace view stg_vocab_blocks as
select block_id, first_token_id, n_tokens, vocab_ids from src_vocab_blocks;
