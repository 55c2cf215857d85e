-- The bytes at the start of a text that only continue a letter begun before it.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   UTF-8 bytes as hexadecimal digits, two a byte, in and out.
-- Ask it:  select letter_rest('AC41')  -- AC, the last byte of the euro sign
create or replace macro letter_rest(digits) as
regexp_extract(digits, '^((?:[89AB].){1,3})', 1);
