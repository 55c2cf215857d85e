-- The whole letters at the start of some bytes, in lower case; null if they are no text.
--
-- Grain:   scalar.
-- Reads:   open_letter
-- Units:   UTF-8 bytes as hexadecimal digits, two a byte. A letter that is not finished at the end is left out.
-- Ask it:  select begun_letters('2041E2')  -- a blank and an a
create or replace macro begun_letters(digits) as
lower(try(decode(unhex(left(digits, length(digits) - length(open_letter(digits)))))));
