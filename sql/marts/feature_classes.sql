-- How well each feature tells each class of tokens from all other tokens.
--
-- Grain:   one row per annotation, class and feature that fires.
-- Reads:   stg_feature_classes
-- Units:   over the encoded tokens, those where the feature is silent included. n_fires counts tokens at which it
--          fires, n_both those of the class. auroc and average_precision rank tokens by the feature's value, as in
--          scikit-learn. threshold is the value with the best f1; precision and recall are those at this value. lift
--          is the share of the class where the feature fires, divided by its share of all tokens. correlation is
--          point-biserial. auroc_low to auroc_high and f1_low to f1_high are 95% intervals by resampled documents,
--          for the best features of each class only, else null. t and p test by documents whether value and class go
--          together; q is the Benjamini-Hochberg false discovery rate of p among all pairs of the probe. Made by
--          `saeflow probe`.
-- Ask it:  which features tell a class with a false discovery rate below 0.01?
create or replace view feature_classes as
select * from stg_feature_classes;
