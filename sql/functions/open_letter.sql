-- The bytes at the end of a text that begin a letter without finishing it.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   UTF-8 bytes as hexadecimal digits, two a byte, in and out; empty if the last letter is whole.
-- Ask it:  select open_letter('41E282')  -- E282, the first two bytes of the euro sign
create or replace macro open_letter(digits) as
regexp_extract(right(digits, 6), '^(?:..)*?((?:C[2-9A-F]|D.|E.(?:[89AB].)?|F[0-4](?:[89AB].){0,2}))$', 1);
