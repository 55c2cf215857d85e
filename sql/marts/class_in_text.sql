-- Some spans of a class of an annotation in the text around them, with the tokens that have the class.
--
-- Grain:   one row per span, in the order of the draw; token_id is the first token of the span.
-- Reads:   stg_spans, token_surroundings, draw_order
-- Units:   before and after count tokens; the text never leaves the document. pieces and place are those of contexts;
--          feature_values has 1 for each token of the span that has the class and 0 for others. n_tokens counts the
--          tokens of the whole span. The seed chooses the draw: see draw_order.
-- Parameters: annotation text, class text, n bigint = 10, before bigint = 12, after bigint = 12, seed bigint = 0
-- Ask it:  which tokens did the annotation mark?  from class_in_text('kinds', 'number')
create or replace macro class_in_text(annotation, class, n := 10, before := 12, after := 12, seed := 0) as table
with spans as materialized (
    select stored.first_token_id, stored.last_token_id
    from stg_spans as stored
    where stored.annotation = annotation::varchar and stored.class = class::varchar
),
drawn as materialized (
    select first_token_id as token_id, last_token_id, draw_order(first_token_id, seed) as draw
    from spans
    order by draw, first_token_id
    limit n
),
near as (
    select distinct unnest(generate_series(
        greatest(spans.first_token_id, token_id - before), least(spans.last_token_id, token_id + after)
    )) as token_id
    from drawn
    join spans on spans.first_token_id <= token_id + after and spans.last_token_id >= token_id - before
)
select
    token_id,
    drawn.last_token_id - token_id + 1 as n_tokens,
    found.place,
    found.pieces,
    found.feature_values,
    found.key,
    found.source,
    found.position
from drawn
join token_surroundings(
    (select list(token_id) from drawn),
    (select coalesce(list({'token_id': token_id, 'value': 1::double}), []) from near),
    before,
    after
) as found using (token_id)
order by drawn.draw, token_id;
