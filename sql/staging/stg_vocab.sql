-- The tokenizer's vocabulary.
--
-- Grain:   one row per vocabulary entry.
-- Reads:   src_vocab
-- Units:   byte_digits are the entry's raw bytes as hexadecimal digits, two a byte.
-- Ask it:  which entries are less than a whole letter?
create or replace view stg_vocab as
select vocab_id, piece, hex(bytes) as byte_digits from src_vocab;
