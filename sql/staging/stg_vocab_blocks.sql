-- Vocabulary ids of consecutive tokens, many in one row: a few of them are found without reading a column.
--
-- Grain:   one row per block of at most 512 tokens; two with one block_id where a part ends inside a block.
-- Reads:   src_vocab_blocks
-- Units:   block_id is token_id // 512; vocab_ids is a blob of 4-byte big-endian ids (block_vocab_id takes one out).
-- Ask it:  what is the vocabulary id of token 4711? (filter on block_id, then on first_token_id and n_tokens)
create or replace view stg_vocab_blocks as
select block_id, first_token_id, n_tokens, vocab_ids from src_vocab_blocks;
