-- The bytes of a text, those of a very long one cut: its first letters, an ellipsis, and the letter it leaves open.
--
-- Grain:   scalar.
-- Reads:   open_letter
-- Units:   hexadecimal digits, two a byte. Up to 1,000 bytes stay whole. A letter that the next token finishes stays.
-- Ask it:  select short_digits('AB'::blob)  -- 4142
create or replace macro short_digits(bytes) as
case
    when octet_length(bytes) <= 1000 then hex(bytes)
    else regexp_replace(hex(bytes[1:1000]), open_letter(hex(bytes[1:1000])) || '$', '')
        || 'E280A6'
        || open_letter(hex(bytes[-3:]))
end;
