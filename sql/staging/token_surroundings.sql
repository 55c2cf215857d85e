-- The tokens around some tokens, with a feature's value at each, for a list of token ids.
--
-- Grain:   one row per token of the list that is real and in a visible document. No token may be listed twice.
-- Reads:   token_spans, letter_rest, open_letter, lossy_text
-- Units:   pieces and feature_values have one entry for each token of the span: `before` tokens in front and `after`
--          tokens behind, inside the document. place is the token's place in the span, from 1. If the bytes of a letter
--          are spread over several tokens, the letter belongs to the token that begins it; half letters at the far
--          edges are dropped. firing lists the feature's tokens with their values; a value is 0 where it is silent.
-- Ask it:  from token_surroundings([0, 4711], [{'token_id': 0, 'value': 0.5}], 12, 12)
create or replace macro token_surroundings(ids, firing, before, after) as table
with fired as (
    select unnest(firing, recursive := true)
),
spans as materialized (
    from token_spans(ids, before, after)
),
near as (
    select
        *,
        lag(short_digits, 3, '') over along
            || lag(short_digits, 2, '') over along
            || lag(short_digits, 1, '') over along as in_front,
        lead(short_digits, 1, '') over along
            || lead(short_digits, 2, '') over along
            || lead(short_digits, 3, '') over along as behind,
        row_number() over along as span_place
    from spans
    window along as (partition by centre order by token_id rows between unbounded preceding and unbounded following)
),
letters as (
    select
        near.*,
        case
            when open_letter(in_front) <> '' or (span_place <= 3 and regexp_full_match(in_front, '(?:[89AB].)*'))
                then substr(short_digits, 1 + length(letter_rest(short_digits)))
            else short_digits
        end || case when open_letter(short_digits) <> '' then letter_rest(behind) else '' end as digits
    from near
)
select
    centre                                                       as token_id,
    any_value(span_place) filter (where token_id = centre)       as place,
    list(lossy_text(left(digits, length(digits) - length(open_letter(digits)))) order by token_id) as pieces,
    list(coalesce(fired.value, 0) order by token_id)             as feature_values,
    any_value(key)                                               as key,
    any_value(letters.source)                                    as source,
    any_value(position)                                          as position
from letters
left join fired using (token_id)
group by centre;
