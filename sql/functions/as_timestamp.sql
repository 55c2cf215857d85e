-- A date or time as metadata write it.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   UTC. Read are dates, times with and without a zone, months (1813-01), years (1813) and seconds since 1970 of
--          nine or ten digits; null for everything else.
-- Ask it:  select as_timestamp('1813')  -- 1813-01-01 00:00:00
create or replace macro as_timestamp(word) as
coalesce(
    case when regexp_matches(word, ':\d\d.*[+-]\d\d(?::?\d\d)?$') then
        make_timestamp(epoch_us(try_cast(word as timestamptz)))
    end,
    try_cast(word as timestamp),
    try_strptime(word, ['%Y-%m', '%Y']),
    try(make_timestamp((1000000 * try_cast(regexp_extract(word, '^\d{9,10}(?:\.\d+)?$') as double))::bigint))
);
