-- A feature's strongest tokens, with its value at every token around them.
--
-- Grain:   one row per token, the strongest first; ties in corpus order.
-- Reads:   tokens_of_feature, token_surroundings, strength
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
    select token_id, value from firing order by strength(value) desc, token_id limit n
)
select token_id, best.value, found.place, found.pieces, found.feature_values, found.key, found.source, found.position
from best
join token_surroundings(
    (select list(token_id) from best), (select list(firing) from firing), before, after
) as found using (token_id)
order by strength(best.value) desc, token_id;
