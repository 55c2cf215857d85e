-- Some tokens, given as a list of their numbers, in the text around them.
--
-- Grain:   one row per different token of the list that is a real one of a visible document.
-- Reads:   token_spans, open_letter, letter_rest, lossy_text
-- Units:   before and after count tokens; the text never leaves the document. A letter whose bytes are spread over
--          several tokens belongs to token_text; half letters at the far edges are dropped. In context such marks as «
--          in the text itself become ‹ and ›.
-- Ask it:  from token_texts([0, 4711], 12, 12)
create or replace macro token_texts(ids, before, after) as table
with digits as (
    select
        centre,
        key,
        source,
        position,
        any_value(piece) filter (where token_id = centre)                                         as piece,
        coalesce(string_agg(byte_digits, '' order by token_id) filter (where token_id < centre), '') as in_front,
        coalesce(string_agg(byte_digits, '' order by token_id) filter (where token_id = centre), '') as middle,
        coalesce(string_agg(byte_digits, '' order by token_id) filter (where token_id > centre), '') as behind
    from token_spans(ids, before, after)
    group by all
),
begun as (
    select *, case when letter_rest(middle) = '' then '' else open_letter(in_front) end as lead from digits
),
finished as (
    select *, case when open_letter(lead || middle) = '' then '' else letter_rest(behind) end as rest from begun
),
parted as (
    select
        *,
        regexp_replace(left(in_front, length(in_front) - length(lead)), '^(?:[89AB].){1,3}', '') as digits_before,
        lead || middle || rest                                                                   as digits_here,
        substr(behind, length(rest) + 1)                                                         as digits_after
    from finished
),
words as (
    select
        *,
        lossy_text(digits_before) as text_before,
        lossy_text(digits_here)   as token_text,
        lossy_text(left(digits_after, length(digits_after) - length(open_letter(digits_after)))) as text_after
    from parted
)
select
    centre as token_id,
    piece,
    text_before,
    token_text,
    text_after,
    translate(text_before, '«»', '‹›')
        || '«' || translate(token_text, '«»', '‹›') || '»'
        || translate(text_after, '«»', '‹›') as context,
    key,
    source,
    position
from words;
