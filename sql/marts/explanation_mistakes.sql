-- Tokens that cost a feature's labels points: where the feature and what is said of it disagree.
--
-- Grain:   one row per source of the label, judging model, method and token. Of each source, model and method there are
--          at most n firing and n silent tokens. By source, model and method; firing ones first.
-- Reads:   stg_explanation_mistakes, token_texts
-- Units:   asked is true if the feature fires in the context (for fuzzing: at the marked tokens). answered is what a
--          language model said by the label, always the opposite. Of the method rule it is what the rule of
--          `saeflow explain` says of the token (model is then null): the strata are then strongest (the strongest
--          held-out firings that the rule misses) and random (drawn from the held-out tokens at which it is wrong to
--          see a firing). Other strata are those of explanation_scores. context shows 12 tokens on either side. Tokens
--          of forgotten documents are left out.
-- Parameters: feature bigint, n bigint = 100
-- Ask it:  where do the labels of feature 12 fail?  from explanation_mistakes(12)
create or replace macro explanation_mistakes(feature, n := 100) as table
with chosen as materialized (
    from stg_explanation_mistakes where feature_id = feature
),

found as (
    from token_texts((select list(distinct token_id) from chosen), 12, 12)
)
select
    chosen.source,
    chosen.model,
    chosen.method,
    chosen.stratum,
    token_id,
    chosen.asked,
    chosen.answered,
    found.piece,
    found.context,
    found.key,
    found.position
from chosen
join found using (token_id)
qualify row_number() over (
    partition by chosen.source, chosen.model, chosen.method, chosen.asked order by token_id
) <= n
order by chosen.source, chosen.model, chosen.method, chosen.asked desc, token_id;
