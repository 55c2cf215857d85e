-- The tokenizer's vocabulary.
--
-- Grain:   one row per vocabulary entry.
-- Reads:   src_vocab, short_text, short_digits
-- Units:   byte_digits are the entry's raw bytes as hexadecimal digits, two a byte. piece and short_digits are cut if
--          an entry has more than 1,000 bytes, because answers hold many pieces; whole_piece is never cut.
-- Ask it:  which entries are less than a whole letter?
create or replace view stg_vocab as
select
    vocab_id,
    short_text(piece)   as piece,
    piece               as whole_piece,
    hex(bytes)          as byte_digits,
    short_digits(bytes) as short_digits
from src_vocab;
