-- A feature's strongest tokens, with its value at every token around them.
--
-- Grain:   one row per token, the strongest first; ties in corpus order.
-- Reads:   tokens_of_feature, token_spans, letter_rest, open_letter, lossy_text, strength
-- Units:   pieces and feature_values have one entry for each token of the span: `before` tokens in front and `after`
--          tokens behind, inside the document. place is the strongest token's place in the span, from 1. If the bytes
--          of a letter are spread over several tokens, the letter belongs to the token that begins it; half letters at
--          the far edges are dropped. A value is 0 where the feature is silent, in the units of the activations. In
--          a signed run the strongest have the largest magnitude.
-- Parameters: feature bigint, n bigint = 20, before bigint = 12, after bigint = 12
-- Ask it:  how does feature 12 rise and fall around its peaks?  from contexts(12)
create or replace macro contexts(feature, n := 20, before := 12, after := 12) as table
with firing as materialized (
    from tokens_of_feature(feature)
),
best as materialized (
    select token_id as centre, value from firing order by strength(value) desc, token_id limit n
),
spans as materialized (
    from token_spans((select list(centre) from best), before, after)
),
near as (
    select
        *,
        lag(byte_digits, 3, '') over along
            || lag(byte_digits, 2, '') over along
            || lag(byte_digits, 1, '') over along as in_front,
        lead(byte_digits, 1, '') over along
            || lead(byte_digits, 2, '') over along
            || lead(byte_digits, 3, '') over along as behind,
        row_number() over along as span_place
    from spans
    window along as (partition by centre order by token_id rows between unbounded preceding and unbounded following)
),
letters as (
    select
        centre,
        token_id,
        key,
        source,
        position,
        case
            when open_letter(in_front) <> '' or (span_place <= 3 and regexp_full_match(in_front, '(?:[89AB].)*'))
                then substr(byte_digits, 1 + length(letter_rest(byte_digits)))
            else byte_digits
        end || case when open_letter(byte_digits) <> '' then letter_rest(behind) else '' end as digits
    from near
),
texts as (
    select
        centre,
        any_value(key)                                               as key,
        any_value(source)                                            as source,
        any_value(position)                                          as position,
        min(token_id)                                                as first_token_id,
        list(lossy_text(left(digits, length(digits) - length(open_letter(digits)))) order by token_id) as pieces,
        list(coalesce(firing.value, 0) order by token_id)            as feature_values
    from letters
    left join firing using (token_id)
    group by centre
)
select
    centre as token_id,
    best.value,
    centre - first_token_id + 1 as place,
    pieces,
    feature_values,
    key,
    source,
    position
from best
join texts using (centre)
order by strength(best.value) desc, token_id;
