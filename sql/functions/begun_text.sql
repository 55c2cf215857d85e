-- The whole letters at the start of some bytes, in lower case and without leading white space; null if they are no
-- text.
--
-- Grain:   scalar.
-- Reads:   begun_letters
-- Units:   UTF-8 bytes as hexadecimal digits, two a byte. A letter that is not finished at the end is left out.
-- Ask it:  select begun_text('2041E2')  -- a
create or replace macro begun_text(digits) as
ltrim(begun_letters(digits), E' \t\n\r');
