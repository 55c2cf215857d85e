-- The size of the corpus, by which counts become rates.
--
-- Grain:   one row.
-- Reads:   stg_documents, stg_encoded_tokens, stg_shape
-- Units:   n_real_tokens counts real tokens of visible documents. n_encoded_tokens counts those that could fire: real
--          tokens that no setting skips. It equals n_real_tokens if an earlier saeflow did not count them in every
--          part.
-- Ask it:  how many tokens are there?
create or replace view stg_size as
select
    n_real_tokens,
    case
        when (select has_marginals from stg_shape)
            then coalesce((select sum(n_tokens)::bigint from stg_encoded_tokens), 0)
        else n_real_tokens
    end as n_encoded_tokens
from (select coalesce(sum(n_tokens), 0)::bigint as n_real_tokens from stg_documents);
