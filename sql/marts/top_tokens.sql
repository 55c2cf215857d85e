-- The tokens at which a feature is strongest, in their context.
--
-- Grain:   one row per token, the strongest first; ties in corpus order.
-- Reads:   tokens_of_feature, token_texts, strength
-- Units:   value is in the units of the activations. context shows up to 12 tokens on either side, inside the document,
--          with the token between « and »; the same marks in the text itself become ‹ and ›. In a signed
--          run the strongest have the largest magnitude; values keep their signs.
-- Parameters: feature bigint, n bigint = 20
-- Ask it:  what does feature 12 stand for?  from top_tokens(12)
create or replace macro top_tokens(feature, n := 20) as table
with best as materialized (
    select token_id, value
    from tokens_of_feature(feature)
    order by strength(value) desc, token_id
    limit n
)
select token_id, best.value, found.piece, found.context, found.key, found.source, found.position
from best
join token_texts((select list(token_id) from best), 12, 12) as found using (token_id)
order by strength(best.value) desc, token_id;
