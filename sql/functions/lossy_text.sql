-- Bytes as text. Bytes that are not UTF-8 become the replacement character instead of an error.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   bytes come as hexadecimal digits, two a byte.
-- Ask it:  select lossy_text('41FF42')  -- A�B
create or replace macro lossy_text(digits) as
coalesce(
    try(decode(unhex(digits))),
    array_to_string(
        list_transform(
            regexp_extract_all(
                digits, '[0-7].|(?:C[2-9A-F]|D.)[89AB].|E.(?:[89AB].){2}|F[0-4](?:[89AB].){3}|..'
            ),
            lambda letter: coalesce(try(decode(unhex(letter))), '�')
        ),
        ''
    )
);
