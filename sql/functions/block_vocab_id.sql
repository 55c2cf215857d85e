-- The vocabulary id at one place of a block of stg_vocab_blocks.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   place counts tokens from 0; the block is a blob of 4-byte big-endian ids.
-- Ask it:  select block_vocab_id('\x00\x00\x00\x07\x00\x00\x01\x00'::blob, 1)  -- 256
create or replace macro block_vocab_id(vocab_ids, place) as
(vocab_ids[(place) * 4 + 1 : (place) * 4 + 4])::bit::integer;
