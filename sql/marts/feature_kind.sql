-- The kind of each feature, by where it fires.
--
-- Grain:   one row per feature, by feature_id, dead ones too.
-- Reads:   stg_summaries
-- Units:   kind is the first of these that is true:
--          dead          it never fires;
--          rare          it fires on fewer than 10 tokens, or on less than a millionth of them;
--          dense         it fires on more than a tenth of the tokens;
--          single-token  nine tenths of its tokens have one vocabulary entry (vocab_id);
--          position      nine tenths of its tokens lie in one band of positions that has at most a quarter of all;
--          other         none of these.
--          density is the feature's share of the encoded tokens. vocab_share and band_share are the shares of its own
--          tokens that have its commonest entry, and that lie in its commonest band. Bands are those of
--          position_profile.
-- Ask it:  how many features are no more than a word?
create or replace view feature_kind as
select feature_id, kind, n_tokens, density, vocab_id, vocab_share, band_share
from stg_summaries
order by feature_id;
